"""What a forward pass must know of its micro-batch besides the tokens."""

from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams

from megaroute.routing.context import RoutingContext


@dataclass
class MicroBatch(PackedSeqParams):
    """How rows were packed, and what routing needs; travels to every layer as Megatron-core's `packed_seq_params`.

    Megatron-core hands that argument through blocks, pipeline schedules and activation recomputation unchanged.  That
    is what routing needs: a recomputation sees the very object of its forward pass.
    """

    routing: RoutingContext = field(default_factory=RoutingContext)


def micro_batch(sequence_length: int, routing: RoutingContext) -> MicroBatch:
    """The micro-batch of rows of `sequence_length` tokens, all tensor ranks' share together."""
    return MicroBatch(qkv_format="sbhd", max_seqlen_q=sequence_length, max_seqlen_kv=sequence_length, routing=routing)
