"""One small sum over all ranks per step: the loss, what routing did, and whether anybody asks to stop."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megaroute.training.batches import Micro
from megaroute.training.parts import Parts


@dataclass(frozen=True)
class Totals:
    """Sums over the global batch, equal on all ranks."""

    loss: float
    """Cross entropy, nats per token."""
    stop: bool
    """Whether any rank was asked to stop."""
    kept: tuple[int, ...]
    """Executed tokens of each routed layer, in order of layers."""
    rows: tuple[int, ...]
    """Rows computed for each, padding included."""
    pairs: tuple[int, ...]
    """Query-key pairs computed for each."""
    squared_gap: tuple[float, ...]
    """Mean over micro-batches of (density of the micro-batch - target)^2, for each."""
    tokens: int
    """Tokens of the global batch."""

    @property
    def density(self) -> tuple[float, ...]:
        """Share of tokens executed, per routed layer."""
        return tuple(kept / self.tokens for kept in self.kept)

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


def reduce_step(parts: Parts, micros: list[Micro], reports: list[dict[str, Tensor]], stop: bool = False) -> Totals:
    """Sum over ranks in float64, where counts are exact; tensor rank 0 of each stage speaks for its stage."""
    config, groups = parts.config, parts.groups
    units = config.routed_layers
    sums = torch.zeros(2 + 4 * len(units), dtype=torch.float64)
    micro_batches = len(micros) * groups.dims.data
    if groups.tensor_rank == 0:
        for report in reports:
            sums[0] += report["losses"].double().mean().cpu() / micro_batches
        for index, unit in enumerate(units):
            sums[2 + 4 * index : 6 + 4 * index] = _of_unit(micros, unit, config.routing.density, micro_batches)
    sums[1] = float(stop)
    sums = sums.to(parts.platform.device)
    dist.all_reduce(sums)
    loss, stops, *values = sums.tolist()
    tokens = micro_batches * config.train.micro_batch * config.data.sequence_length
    return Totals(
        loss=loss,
        stop=stops > 0,
        kept=tuple(round(value) for value in values[0::4]),
        rows=tuple(round(value) for value in values[1::4]),
        pairs=tuple(round(value) for value in values[2::4]),
        squared_gap=tuple(values[3::4]),
        tokens=tokens,
    )


def _of_unit(micros: list[Micro], unit: int, target: float, micro_batches: int) -> Tensor:
    records = [micro.info.routing.records[unit] for micro in micros if unit in micro.info.routing.records]
    kept = [int(record.keep_SB.sum()) for record in records]
    gaps = [(k / record.keep_SB.numel() - target) ** 2 for k, record in zip(kept, records, strict=True)]
    rows, pairs = sum(record.rows for record in records), sum(record.attention_pairs for record in records)
    return torch.tensor([sum(kept), rows, pairs, sum(gaps) / micro_batches], dtype=torch.float64)
