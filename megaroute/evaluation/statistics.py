"""Standard errors, bootstrap intervals, and rank correlation."""

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float | None]:
    """sum(numerator) / sum(denominator) over [N] independent units, and its standard error by linearisation.

    The error is None for a single unit, which says nothing of how much others would differ.
    """
    total = float(denominator.sum())
    value = float(numerator.sum()) / total
    count = len(numerator)
    if count < 2:
        return value, None
    residual = numerator - value * denominator
    return value, math.sqrt(count / (count - 1) * float((residual**2).sum())) / total


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [N]; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of two [N]; NaN where one of them does not vary."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else math.nan


def interval(
    statistic: Callable[[np.ndarray], float], groups: int, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic`, which is given int64 [groups] numbers drawn with replacement."""
    draw = np.random.default_rng(seed)
    values = [statistic(draw.integers(groups, size=groups)) for _ in range(resamples)]
    tail = (1 - level) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail]) if not np.isnan(values).all() else (math.nan, math.nan)
    return float(low), float(high)
