"""One small sum over all ranks per step: loss, what routing did, whether anybody asks to stop or all have saved."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megaroute.config.units import Unit
from megaroute.data.stream import Batch
from megaroute.model.flops import UnitWork
from megaroute.training.batches import Micro
from megaroute.training.parts import Parts
from megaroute.training.supply import Supply, columns, supply_of
from megaroute.training.tally import FIELDS, dense_pairs, num_experts, tally


@dataclass(frozen=True)
class Totals:
    """Sums over the global batch, equal on all ranks; lists are in order of config.units."""

    loss: float
    """Cross entropy, nats per token."""
    stop: bool
    """Whether any rank was asked to stop."""
    tokens: int
    """Tokens of the global batch that have a target: all its positions without `padding`."""
    dense_pairs: tuple[int, int]
    """Query-key pairs of one attention of every token: computed, and those of a token and a key that it sees."""
    kept: tuple[int, ...]
    """Executed tokens of each unit."""
    rows: tuple[int, ...]
    """Rows computed for each, padding included; of a mixture of experts, pairs of token and expert."""
    pairs: tuple[int, ...]
    """Query-key pairs computed for each."""
    needed_pairs: tuple[int, ...]
    """Those of a kept token and a key that it sees."""
    overflow: tuple[int, ...]
    """Rows of each that the router wanted and the capacity did not allow."""
    soft: tuple[float, ...]
    """Mean probability of executing, of each; 0 where the router has none."""
    squared_gap: tuple[float, ...]
    """Mean over micro-batches of (density of the micro-batch - target)^2, for each, of the density that
    routing.budget.density names.  Of the soft one, the slices of sequence parallelism count as micro-batches."""
    choices: tuple[tuple[int, ...], ...]
    """Choices that fell on each expert, before the limit; empty unless a unit is a mixture of experts."""
    expert_probability: tuple[tuple[float, ...], ...]
    """Mean probability of each expert."""
    replica_rows: tuple[tuple[int, ...], ...]
    """Rows of each unit by data-parallel replica."""
    supply: Supply = field(default_factory=Supply)
    """What the step took from the data."""
    saved: bool = False
    """Whether every rank had done its part of a checkpoint that is being written."""
    padding: int = 0
    """Positions of the global batch behind the last document of their row."""

    @property
    def positions(self) -> int:
        """Positions of the global batch, rows * S."""
        return self.tokens + self.padding

    @property
    def density(self) -> tuple[float, ...]:
        """Share of tokens executed, per unit."""
        return tuple(kept / self.tokens for kept in self.kept)

    @property
    def wanted(self) -> tuple[float, ...]:
        """Share of tokens that each unit's router chose, also those for which there was no capacity."""
        return tuple((kept + over) / self.tokens for kept, over in zip(self.kept, self.overflow, strict=True))

    @property
    def dropped(self) -> tuple[float, ...]:
        """Share of what each unit's router chose for which there was no capacity; of experts, of their choices."""
        chosen = [sum(c) or kept + over for c, kept, over in zip(self.choices, self.kept, self.overflow, strict=True)]
        return tuple(over / max(number, 1) for over, number in zip(self.overflow, chosen, strict=True))

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)

    def work(self, units: tuple[Unit, ...]) -> list[UnitWork]:
        """What each unit did, for counting FLOPs."""
        columns = zip(units, self.kept, self.rows, self.pairs, self.needed_pairs, self.overflow, strict=True)
        return [UnitWork(*values) for values in columns]


def reduce_step(
    parts: Parts,
    micros: list[Micro],
    reports: list[dict[str, Tensor]],
    stop: bool = False,
    batch: Batch | None = None,
) -> Totals:
    """Sum over ranks in float64, where counts are exact; tensor rank 0 of each stage speaks for its stage.

    `batch` holds the rows of the step where they are read.
    """
    config, groups, device = parts.config, parts.groups, parts.platform.device
    micro_batches = len(micros) * groups.dims.data
    table = tally(config, groups, micros, parts.state.step, device)
    head = torch.zeros(5, dtype=torch.float64, device=device)
    if groups.tensor_rank == 0 and reports:
        losses = [micro.mean_loss(report["losses"].double()) for micro, report in zip(micros, reports, strict=True)]
        head[0] = torch.stack(losses).sum() / micro_batches
    head[1], head[2] = float(stop), float(parts.checkpoints.can_advance)
    if groups.tensor_rank == 0 and groups.is_first_stage:
        head[3:] = dense_pairs(micros, config.data.sequence_length, device)
    taken = torch.tensor(columns(config, groups, batch), dtype=torch.float64).to(device)
    sums = torch.cat([head, table.flatten(), taken])
    dist.all_reduce(sums)
    width, values = table.shape[1], sums.tolist()
    end = len(values) - len(taken)
    rows = [values[start : start + width] for start in range(len(head), end, width)]
    positions = micro_batches * config.train.micro_batch * config.data.sequence_length
    mean_tokens = micros[0].info.routing.mean_tokens
    tokens = positions if mean_tokens is None else round(mean_tokens * micro_batches)
    supply = supply_of(config, groups.dims.data, values[end:])
    totals = _totals(values[: len(head)], tokens, rows, micro_batches, num_experts(config), supply)
    return replace(totals, padding=positions - tokens, saved=round(values[2]) == dist.get_world_size())


def _totals(
    head: list[float], tokens: int, table: list[list[float]], micro_batches: int, experts: int, supply: Supply
) -> Totals:
    column = {name: [row[index] for row in table] for index, name in enumerate(FIELDS)}
    first, second = len(FIELDS) + experts, len(FIELDS) + 2 * experts
    return Totals(
        loss=head[0],
        stop=head[1] > 0,
        tokens=tokens,
        dense_pairs=(round(head[3]), round(head[4])),
        kept=tuple(map(round, column["kept"])),
        rows=tuple(map(round, column["rows"])),
        pairs=tuple(map(round, column["pairs"])),
        needed_pairs=tuple(map(round, column["needed_pairs"])),
        overflow=tuple(map(round, column["overflow"])),
        soft=tuple(value / micro_batches for value in column["soft"]),
        squared_gap=tuple(value / micro_batches for value in column["squared_gap"]),
        choices=tuple(tuple(map(round, row[len(FIELDS) : first])) for row in table),
        expert_probability=tuple(tuple(p / micro_batches for p in row[first:second]) for row in table),
        replica_rows=tuple(tuple(map(round, row[second:])) for row in table),
        supply=supply,
    )
