"""Micro-batches of a step: tokens where a stage reads them, routing context everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaroute.config.root import Config
from megaroute.data.stream import Batch
from megaroute.model.microbatch import MicroBatch, micro_batch
from megaroute.parallel.groups import Groups
from megaroute.platform.device import Platform
from megaroute.routing.context import RoutingContext


@dataclass(frozen=True)
class Micro:
    """One micro-batch of this replica: B rows of S tokens."""

    tokens_BS: Tensor | None
    """int64, inputs; None on stages that see no tokens, see Parts.reads_tokens."""
    labels_BS: Tensor | None
    """int64, targets."""
    info: MicroBatch
    """What every layer is told."""

    @property
    def row_tokens(self) -> list[int]:
        """Tokens of each row without padding."""
        routing, length = self.info.routing, self.info.max_seqlen_q
        real_SB = routing.real_SB
        return [length] * routing.samples_B.numel() if real_SB is None else real_SB.sum(0).tolist()

    def without_padding(self, values_BS: Tensor) -> Tensor:
        """Values where there is a target: [B, S] as it is, or [n] in no order that matters."""
        real_SB = self.info.routing.real_SB
        return values_BS if real_SB is None else values_BS[real_SB.T]

    def mean_loss(self, losses_BS: Tensor) -> Tensor:
        """Mean over the targets, scalar.

        With padding it is their sum by the mean number of targets of a micro-batch, so that the mean over micro-batches
        and replicas is that over all targets.
        """
        routing = self.info.routing
        if routing.real_SB is None or routing.mean_tokens is None:
            return losses_BS.mean()
        return (losses_BS * routing.real_SB.T).sum() / routing.mean_tokens  # no indexing: it would wait for the device


def sample_numbers(first: int, rows: int, groups: Groups) -> np.ndarray:
    """Global numbers, int64 [rows], of this replica's rows of a global batch that starts at row `first`.

    Every stage works them out from the step, so that routing noise needs no message.
    """
    data = groups.dims.data
    # Row g belongs to the replica that g leads to from the start of the batch: the stream deals rows in turn.
    return first + groups.data_rank + data * np.arange(rows, dtype=np.int64)


def mean_targets(config: Config, platform: Platform, groups: Groups, batch: Batch | None) -> float | None:
    """Mean number of targets of the micro-batches of a step, of all replicas; None where every position has one.

    Replicas have to agree on it before the backward pass: the loss is the mean over all targets of the global batch.
    """
    if not config.data.pads:
        return None
    assert batch is not None, "every stage reads rows that may end in padding"
    total = torch.tensor([batch.targets.sum()], dtype=torch.float64, device=platform.device)
    dist.all_reduce(total, group=groups.data_group)
    micro_batches = len(batch.targets) // config.train.micro_batch * groups.dims.data
    return max(total.item(), 1.0) / micro_batches


def cut(
    config: Config,
    platform: Platform,
    batch: Batch | None,
    samples: np.ndarray,
    step: int,
    budget_scale: float = 0.0,
    mean_tokens: float | None = None,
) -> list[Micro]:
    """Micro-batches of train.micro_batch rows; `batch` holds the rows `samples`, or is None where none are read.

    `mean_tokens` is what `mean_targets` says; given exactly where rows may end in padding.
    """
    size, length = config.train.micro_batch, config.data.sequence_length
    micros = []
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        routing = RoutingContext(
            seed=config.train.seed,
            step=step,
            samples_B=platform.upload(samples[rows]),
            budget_scale=budget_scale,
            mean_tokens=mean_tokens,
        )
        tokens = labels = starts = None
        if batch is not None:
            ids = platform.upload(batch.ids[rows].astype(np.int64))
            tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            if not config.data.attend_across_documents:
                starts = platform.upload(batch.starts[rows].T.copy())
            if mean_tokens is not None:
                routing.real_SB = platform.upload(np.arange(length)[:, None] < batch.targets[rows])
        micros.append(Micro(tokens, labels, micro_batch(length, routing, starts)))
    return micros


def iterators(micros: list[Micro], chunks: int) -> Iterator[Micro] | list[Iterator[Micro]]:
    """What Megatron-core's schedules want: one iterator, or one per chunk of the interleaved schedule."""
    return iter(micros) if chunks == 1 else [iter(micros) for _ in range(chunks)]
