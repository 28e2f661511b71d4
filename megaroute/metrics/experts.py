"""How evenly the tokens of a mixture of experts lie on its experts."""

from dataclasses import dataclass

from megaroute.metrics.formats import percent, unit_name
from megaroute.metrics.run_view import RunView
from megaroute.metrics.summary import final


@dataclass(frozen=True)
class ExpertRow:
    """One mixture, as text."""

    name: str
    shares: tuple[str, ...]
    """Of all choices, those that fell on each expert, before the limit."""
    uneven: str
    """Largest share over an equal one."""


def experts(run: RunView) -> list[ExpertRow]:
    """Every mixture of experts, in order; nothing when there is none, or choices were not recorded."""
    chosen = [record.choices for record in final(run.history.train) if record.choices]
    return [_row(label, [step[index] for step in chosen]) for index, label in enumerate(run.units)] if chosen else []


def _row(label: str, choices: list[tuple[int, ...]]) -> ExpertRow:
    sums = [sum(of_expert) for of_expert in zip(*choices, strict=True)]
    total = max(sum(sums), 1)
    uneven = f"{max(sums) * len(sums) / total:.3f}"
    return ExpertRow(unit_name(label), tuple(percent(number / total) for number in sums), uneven)
