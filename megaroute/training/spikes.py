"""Steps whose loss or gradient norm stands out above those before."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megaroute.config.training import SpikeConfig
from megaroute.training.state import GuardState

_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST = 1e-3
"""Least deviation counted, relative to the median: losses of a tiny task can stand still."""


@dataclass(frozen=True)
class Spike:
    """A value that stands out."""

    name: str
    """`loss` or `grad_norm`."""
    value: float
    median: float
    deviations: float
    """Robust standard deviations above the median."""

    @property
    def text(self) -> str:
        """`loss 9.1 is 31 standard deviations above the median 3.2 of the steps before`."""
        name = self.name.replace("_", " ")
        height = f"{self.deviations:.0f} standard deviations above the median {self.median:.4g} of the steps before"
        return f"{name} {self.value:.4g} is {height}"


def judge(config: SpikeConfig, memory: GuardState, loss: float, grad_norm: float) -> tuple[Spike, ...]:
    """The spikes of a step with these finite values, which are equal on all ranks; `memory` then holds them as well.

    That spikes stay in the window ends a series: where the level has risen for good, half a window later it is normal.
    """
    found = []
    columns = (
        ("loss", config.loss, memory.losses, loss),
        ("grad_norm", config.grad_norm, memory.grad_norms, grad_norm),
    )
    for name, threshold, seen, value in columns:
        if threshold is None:
            continue
        if len(seen) >= config.window:
            median, deviations = _height(seen[-config.window :], value)
            if deviations > threshold:
                found.append(Spike(name, value, median, deviations))
        seen.append(value)
        del seen[: -config.window]
    return tuple(found)


def _height(seen: Sequence[float], value: float) -> tuple[float, float]:
    median = statistics.median(seen)
    spread = _SIGMA * statistics.median(abs(other - median) for other in seen)
    return median, (value - median) / max(spread, _LEAST * abs(median), 1e-30)
