"""One pass of micro-batches through Megatron-core's pipeline schedule."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megaroute.training.batches import Micro, iterators
from megaroute.training.parts import Parts

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def run_schedule(parts: Parts, micros: list[Micro], forward_only: bool) -> list[dict[str, Tensor]]:
    """Forward (and backward) of all micro-batches.

    Returns on the last stage, per micro-batch, {"losses": float32 [B, S]}: nats per token, detached; elsewhere nothing.
    """
    config, chunks = parts.config, len(parts.wrapped)
    data = iterators(micros, chunks)
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=data,
        model=parts.wrapped[0] if chunks == 1 else parts.wrapped,
        num_microbatches=len(micros),
        seq_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch,
        forward_only=forward_only,
    )


def _forward_step(iterator: Iterator[Micro], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
    micro = next(iterator)
    output = model(micro.tokens_BS, None, None, labels=micro.labels_BS, packed_seq_params=micro.info)
    return output, partial(_mean_loss, micro)


def _mean_loss(micro: Micro, losses_BS: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The micro-batch's share of the loss; the schedule divides by the number of micro-batches."""
    return micro.mean_loss(losses_BS), {"losses": losses_BS.detach()}
