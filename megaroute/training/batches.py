"""Micro-batches of a step: tokens where a stage reads them, routing context everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
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


def sample_numbers(first: int, rows: int, groups: Groups) -> np.ndarray:
    """Global numbers, int64 [rows], of this replica's rows of a global batch that starts at row `first`.

    Every stage works them out from the step, so that routing noise needs no message.
    """
    data = groups.dims.data
    # Row g belongs to the replica that g leads to from the start of the batch: the stream deals rows in turn.
    return first + groups.data_rank + data * np.arange(rows, dtype=np.int64)


def cut(
    config: Config,
    platform: Platform,
    batch: Batch | None,
    samples: np.ndarray,
    step: int,
    budget_scale: float = 0.0,
) -> list[Micro]:
    """Micro-batches of train.micro_batch rows; `batch` holds the rows `samples`, or is None where none are read."""
    size, length = config.train.micro_batch, config.data.sequence_length
    micros = []
    for start in range(0, len(samples), size):
        rows = slice(start, start + size)
        routing = RoutingContext(
            seed=config.train.seed,
            step=step,
            samples_B=platform.upload(samples[rows]),
            budget_scale=budget_scale,
        )
        tokens = labels = starts = None
        if batch is not None:
            ids = platform.upload(batch.ids[rows].astype(np.int64))
            tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            if not config.data.attend_across_documents:
                starts = platform.upload(batch.starts[rows].T.copy())
        micros.append(Micro(tokens, labels, micro_batch(length, routing, starts)))
    return micros


def iterators(micros: list[Micro], chunks: int) -> Iterator[Micro] | list[Iterator[Micro]]:
    """What Megatron-core's schedules want: one iterator, or one per chunk of the interleaved schedule."""
    return iter(micros) if chunks == 1 else [iter(micros) for _ in range(chunks)]
