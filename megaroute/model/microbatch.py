"""What a forward pass must know of its micro-batch besides the tokens."""

from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megaroute.routing.context import RoutingContext


@dataclass
class MicroBatch(PackedSeqParams):
    """How rows were packed, and what routing needs; travels to every layer as Megatron-core's `packed_seq_params`.

    Megatron-core hands that argument through blocks, pipeline schedules and activation recomputation unchanged.  That
    is what routing needs: a recomputation sees the very object of its forward pass.
    """

    routing: RoutingContext = field(default_factory=RoutingContext)
    starts_SB: Tensor | None = None
    """int32 [S, B], on the device: a token attends to the positions of its row from this one to its own, those of its
    document.  Never falls along a row.  None: to all positions up to its own."""


def micro_batch(sequence_length: int, routing: RoutingContext, starts_SB: Tensor | None = None) -> MicroBatch:
    """The micro-batch of rows of `sequence_length` tokens, all tensor ranks' share together."""
    return MicroBatch(
        qkv_format="sbhd",
        max_seqlen_q=sequence_length,
        max_seqlen_kv=sequence_length,
        routing=routing,
        starts_SB=starts_SB,
    )
