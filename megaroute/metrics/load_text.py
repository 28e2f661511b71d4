"""Density, overflow and load in the words of a log line."""

from collections.abc import Sequence

from megaroute.metrics.formats import percent, unit_name
from megaroute.metrics.records import TrainRecord

EVEN = 1.005
"""Up to this maximum over mean a load is not worth a word."""


def density_text(units: Sequence[str], density: Sequence[float], target: float | None, name: str = "density") -> str:
    """`density 11.5 % of 25.0 % (layer 1 7.0 % to layer 3 17.0 %)`: the mean, its target, lowest and highest unit."""
    if not density:
        return "no routed unit"
    parts = [f"{name} {percent(sum(density) / len(density))}"]
    if target is not None:
        parts.append(f"of {percent(target)}")
    low, high = (pick(range(len(density)), key=density.__getitem__) for pick in (min, max))
    if percent(density[low]) != percent(density[high]):
        parts.append(f"({_unit(units, density, low)} to {_unit(units, density, high)})")
    return " ".join(parts)


def load_texts(units: Sequence[str], steps: Sequence[TrainRecord]) -> list[str]:
    """What is not as it should be, means over steps: overflow, and ranks or stages that compute more than others."""
    texts = [_overflow(units, steps), _load(units, steps)]
    return [text for text in texts if text]


def _overflow(units: Sequence[str], steps: Sequence[TrainRecord]) -> str:
    counted = [record for record in steps if record.overflow]
    if not any(sum(record.overflow) for record in counted):
        return ""
    share = sum(record.overflow_share for record in counted) / len(counted)
    dropped = _means([record.dropped for record in counted])
    worst = max(range(len(dropped)), key=dropped.__getitem__)
    return f"overflow {percent(share)} (most {_unit(units, dropped, worst)})"


def _load(units: Sequence[str], steps: Sequence[TrainRecord]) -> str:
    """Maximum over mean of all ranks, of the stages, and of the replicas of the worst unit."""
    loads = [record.load for record in steps if record.load]
    parts = []
    for name, key in (("ranks", "ranks"), ("stages", "stages_max_over_mean")):
        values = [float(load[key]) for load in loads if key in load]
        if values and (mean := sum(values) / len(values)) > EVEN:
            parts.append(f"{name} {mean:.2f}")
    replicas = _means([load["units"] for load in loads if load.get("units")])
    if replicas and max(replicas) > EVEN:
        worst = max(range(len(replicas)), key=replicas.__getitem__)
        parts.append(f"replicas {replicas[worst]:.2f} in {unit_name(units[worst])}")
    return f"load max/mean: {', '.join(parts)}" if parts else ""


def _unit(units: Sequence[str], shares: Sequence[float], index: int) -> str:
    return f"{unit_name(units[index])} {percent(shares[index])}"


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
