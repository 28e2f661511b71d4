"""What the routers of this rank did in a step, as one table that can be summed over ranks.

U units of the whole model, N records (units of this rank by micro-batches), E experts, D replicas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaroute.config.root import Config
from megaroute.model.chosen_attention import attention_pairs, every_row
from megaroute.parallel.groups import Groups
from megaroute.routing.context import UnitRecord
from megaroute.routing.experts import ExpertRecord
from megaroute.training.batches import Micro

FIELDS = ("kept", "rows", "pairs", "needed_pairs", "squared_gap", "overflow", "soft")
"""First columns of the table; then 2 * E for choices and probabilities of experts, then D for rows of each replica."""

OF_SLICE = [FIELDS.index("overflow"), FIELDS.index("soft")]
"""Columns of a rank's slice under sequence parallelism; of the others every tensor rank has the whole."""


def dense_pairs(micros: list[Micro], sequence_length: int, device: torch.device) -> Tensor:
    """Query-key pairs of one attention of every token, float64 [2]: computed, and those of a token and a key it sees.

    Where documents do not attend to each other, every token goes through the kernel for chosen queries.
    """
    pairs = torch.zeros(2, dtype=torch.float64, device=device)
    for micro in micros:
        needed = visible_keys(micro, sequence_length, device).sum()
        computed = needed
        if micro.info.starts_SB is not None:
            plan = every_row(sequence_length, micro.info.starts_SB.shape[1], device)
            computed = attention_pairs(plan, sequence_length, device, micro.info.starts_SB)
        pairs += torch.stack([computed, needed]).double()
    return pairs


def num_experts(config: Config) -> int:
    """E, 0 unless there are mixtures of experts."""
    return config.routing.moe.experts if config.routing.router == "moe" else 0


def tally(config: Config, groups: Groups, micros: list[Micro], step: int, device: torch.device) -> Tensor:
    """This rank's share of the table, float64 [U, len(FIELDS) + 2 * E + D], on `device`; nothing is read to the host.

    The sum over all ranks holds counts of the step, and sums over its micro-batches of the means `squared_gap`, `soft`
    and the experts' probabilities.  A record exists once per unit and micro-batch, however often activations are
    recomputed.
    """
    experts = num_experts(config)
    table = torch.zeros(len(config.units), len(FIELDS) + 2 * experts + groups.dims.data, dtype=torch.float64)
    targets = config.routing.targets(config.model.num_layers, step)
    held = micros[0].info.routing.records
    mine = [index for index, unit in enumerate(config.units) if unit.key in held]
    table = table.to(device)
    if not mine:
        return table
    records = [micro.info.routing.records[config.units[index].key] for index in mine for micro in micros]
    target_N = torch.tensor([targets[index] for index in mine for _ in micros], dtype=torch.float64, device=device)
    visible = [visible_keys(micro, config.data.sequence_length, device) for micro in micros]
    values = _fields(records, target_N, visible, _tokens(micros, device), config.routing.budget.density == "soft")
    values = torch.cat([values, _experts(records, experts, device)], 1).view(len(mine), len(micros), -1).sum(1)
    values *= _speaks(config, groups, values.shape[1]).to(device)
    rows = torch.tensor(mine, device=device)
    table[rows, : values.shape[1]] = values
    table[rows, values.shape[1] + groups.data_rank] = values[:, FIELDS.index("rows")]
    return table


def visible_keys(micro: Micro, sequence_length: int, device: torch.device) -> Tensor:
    """Keys that each token of a micro-batch sees, itself included, int64 [S, B]."""
    positions_S1 = torch.arange(1, sequence_length + 1, device=device)[:, None]
    starts_SB = micro.info.starts_SB
    batch = micro.info.routing.samples_B.numel()
    return positions_S1.expand(-1, batch) if starts_SB is None else positions_S1 - starts_SB


def _tokens(micros: list[Micro], device: torch.device) -> tuple[Tensor, float]:
    """Tokens of each micro-batch without padding, float64, and their mean over the step."""
    first = micros[0].info.routing.records
    every = next(iter(first.values())).keep_SB.numel()
    found, mean = [], float(every)
    for routing in (micro.info.routing for micro in micros):
        real_SB = routing.real_SB
        found.append(torch.tensor(every, device=device) if real_SB is None else real_SB.sum().clamp(min=1))
        mean = routing.mean_tokens or mean
    return torch.stack(found).double(), mean


def _fields(
    records: Sequence[UnitRecord],
    target_N: Tensor,
    visible: Sequence[Tensor],
    tokens: tuple[Tensor, float],
    soft_budget: bool,
) -> Tensor:
    """float64 [N, FIELDS]; records go by unit, then micro-batch, of each of which `visible` has int64 [S, B]."""
    keep_NSB = torch.stack([record.keep_SB for record in records])
    kept_N = keep_NSB.sum((1, 2)).double()
    pairs_N = _numbers([record.attention_pairs for record in records], keep_NSB.device)
    soft_N = _numbers([record.probability for record in records], keep_NSB.device)
    tokens_N = tokens[0].repeat(len(records) // len(visible))
    density_N = soft_N * (tokens[1] / tokens_N) if soft_budget else kept_N / tokens_N
    columns = {
        "kept": kept_N,
        "rows": _numbers([record.rows for record in records], keep_NSB.device),
        "pairs": pairs_N,
        "needed_pairs": torch.minimum(_needed_pairs(keep_NSB, visible), pairs_N),
        "squared_gap": (density_N - target_N) ** 2,
        "overflow": _numbers([record.overflow for record in records], keep_NSB.device),
        "soft": soft_N,
    }
    return torch.stack([columns[name] for name in FIELDS], 1)


def _needed_pairs(keep_NSB: Tensor, visible: Sequence[Tensor]) -> Tensor:
    """Pairs of a kept token and a key that it sees, float64 [N]."""
    step = len(visible)
    pairs = [(keep_NSB[first::step] * visible_SB).sum((1, 2)) for first, visible_SB in enumerate(visible)]
    return torch.stack(pairs, 1).flatten().double()


def _numbers(values: Sequence[int | Tensor | None], device: torch.device) -> Tensor:
    """float64 [N] of numbers that lie on the host or on the device; None counts 0."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(0 if v is None else v, device=device).double() for v in values])
    return torch.tensor([value or 0 for value in values], dtype=torch.float64, device=device)


def _experts(records: Sequence[UnitRecord], experts: int, device: torch.device) -> Tensor:
    """Choices and mean probabilities of the experts, float64 [N, 2 * E]."""
    if not experts:
        return torch.zeros(len(records), 0, dtype=torch.float64, device=device)
    rows = []
    for record in records:
        assert isinstance(record, ExpertRecord) and record.counts_E is not None
        rows.append(torch.cat([record.counts_E.double(), record.probability_E.double()]))
    return torch.stack(rows)


def _speaks(config: Config, groups: Groups, columns: int) -> Tensor:
    """Factor of each column: tensor rank 0 speaks for its stage, but of slices every tensor rank tells its own."""
    factors = torch.full((columns,), float(groups.tensor_rank == 0), dtype=torch.float64)
    if config.parallel.sequence:
        factors[OF_SLICE] = 1.0
        factors[FIELDS.index("soft")] = 1.0 / groups.dims.tensor
    return factors
