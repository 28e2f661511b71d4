"""The report's section on routing: what each unit executed, and where the arithmetic went."""

from collections.abc import Sequence
from dataclasses import dataclass

from megaroute.metrics.drawing import PARTS
from megaroute.metrics.formats import percent, si, unit_name
from megaroute.metrics.records import TrainRecord
from megaroute.metrics.run_view import RunView
from megaroute.metrics.summary import Fact, final

UNRECORDED = "not recorded"
"""Of what an earlier version did not write."""


@dataclass(frozen=True)
class UnitRow:
    """One routed unit, as text; values are means over the last steps."""

    name: str
    target: str
    density: str
    validation: str
    """Density at the last validation."""
    rows: str
    """Rows computed per token, padding included."""
    overflow: str
    load: str
    """Maximum over mean of the replicas."""


def units(run: RunView) -> list[UnitRow]:
    """Every routed unit, in order; nothing before the first step."""
    last = final(run.history.train)
    return [_unit(run, last, index) for index in range(len(run.units))] if last else []


def _unit(run: RunView, last: Sequence[TrainRecord], index: int) -> UnitRow:
    tokens = sum(r.step_tokens for r in last)
    counted = all(r.rows for r in last) and tokens > 0
    loads = [r.load["units"][index] for r in last if r.load.get("units")]
    valid = run.history.valid[-1] if run.history.valid else None
    return UnitRow(
        name=unit_name(run.units[index]),
        target=_target(run, index),
        density=percent(sum(r.density[index] for r in last) / len(last)),
        validation=percent(valid.density[index]) if valid else "",
        rows=percent(sum(r.rows[index] for r in last) / tokens) if counted else UNRECORDED,
        overflow=percent(sum(r.dropped[index] for r in last) / len(last)) if counted else UNRECORDED,
        load=f"{sum(loads) / len(loads):.3f}" if loads else UNRECORDED,
    )


def _target(run: RunView, index: int) -> str:
    first, last = run.targets(1)[index], run.targets()[index]
    if first is None or last is None:
        return "none"
    return percent(last) if first == last else f"{percent(first)} to {percent(last)}"


def arithmetic(run: RunView) -> list[Fact]:
    """Executed FLOPs per token by part, over the whole run; nothing when they were not recorded."""
    train = [r for r in run.history.train if r.flops]
    tokens, executed = sum(r.step_tokens for r in train), sum(r.executed_flops for r in train)
    if not tokens or not executed:
        return []
    facts = []
    for part, (name, _) in PARTS.items():
        flops = sum(r.flops.get(part, 0.0) for r in train)
        facts.append(Fact(name, si(flops / tokens, "FLOP"), f"{percent(flops / executed)} of executed"))
    dense, overflow = sum(r.dense_flops for r in train), sum(r.overflow_flops for r in train)
    facts.append(Fact("executed", si(executed / tokens, "FLOP"), f"{percent(executed / dense)} of dense"))
    facts.append(Fact("every token in every layer", si(dense / tokens, "FLOP"), "the same model without routers"))
    if overflow:
        facts.append(
            Fact("overflow", si(overflow / tokens, "FLOP"), "what rows over capacity would have cost; left out")
        )
    return facts


def load(run: RunView) -> list[Fact]:
    """How evenly ranks and stages compute, over the last steps; nothing when it was not recorded."""
    loads = [r.load for r in final(run.history.train) if r.load]
    if not loads:
        return []
    ranks = sum(each["ranks"] for each in loads) / len(loads)
    facts = [Fact("Ranks", f"{ranks:.3f}", "rows of the busiest rank over the mean, dense layers included: 1 is even")]
    stages = [sum(rows) for rows in zip(*(each["stages"] for each in loads), strict=True)]
    if len(stages) > 1:
        shares = ", ".join(percent(rows / sum(stages)) for rows in stages)
        facts.append(Fact("Stages", shares, "share of the computed rows of each pipeline stage"))
    return facts
