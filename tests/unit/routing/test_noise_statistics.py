"""Routing noise: uniform, independent along every coordinate, and logistic after the logarithms.

All draws are fixed, so that nothing here depends on luck; bounds are those of about five standard errors, which chance
would exceed once in a million draws.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaroute.routing.noise import logistic, uniform

SAMPLES, POSITIONS = torch.arange(96), torch.arange(1024)
SEED, STEP, UNIT = 11, 300, 14

OTHERS = {
    "next seed": lambda: uniform(SEED + 1, STEP, UNIT, SAMPLES, POSITIONS),
    "next step": lambda: uniform(SEED, STEP + 1, UNIT, SAMPLES, POSITIONS),
    "a hundred steps later": lambda: uniform(SEED, STEP + 100, UNIT, SAMPLES, POSITIONS),
    "next unit": lambda: uniform(SEED, STEP, UNIT + 1, SAMPLES, POSITIONS),
    "unit of the next layer": lambda: uniform(SEED, STEP, UNIT + 2, SAMPLES, POSITIONS),
    "step and unit exchanged": lambda: uniform(SEED, UNIT, STEP, SAMPLES, POSITIONS),
    "seed and step exchanged": lambda: uniform(STEP, SEED, UNIT, SAMPLES, POSITIONS),
    "next sample": lambda: uniform(SEED, STEP, UNIT, SAMPLES + 1, POSITIONS),
    "samples of the next batch": lambda: uniform(SEED, STEP, UNIT, SAMPLES + 256, POSITIONS),
    "next position": lambda: uniform(SEED, STEP, UNIT, SAMPLES, POSITIONS + 1),
    "second position after": lambda: uniform(SEED, STEP, UNIT, SAMPLES, POSITIONS + 2),
    "64 positions after": lambda: uniform(SEED, STEP, UNIT, SAMPLES, POSITIONS + 64),
}


def draw() -> Tensor:
    return uniform(SEED, STEP, UNIT, SAMPLES, POSITIONS)


def kolmogorov_smirnov(values: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the given one."""
    ordered = values.flatten().double().sort().values
    n = ordered.numel()
    expected, below = distribution(ordered), torch.arange(n, dtype=torch.double) / n
    return math.sqrt(n) * float(torch.maximum(expected - below, below + 1 / n - expected).max())


KS_LIMIT = 2.5
"""P(sqrt(n) D > x) is about 2 exp(-2 x^2): one in 130 000."""


def subsets(u: Tensor) -> dict[str, Tensor]:
    return {
        "all": u,
        "one sample": u[:, 5],
        "one position": u[7],
        "even positions": u[::2],
        "every 64th position": u[::64],
        "first positions": u[:4],
    }


@pytest.mark.parametrize("subset", subsets(draw()))
def test_uniform_by_kolmogorov_smirnov(subset):
    assert kolmogorov_smirnov(subsets(draw())[subset], lambda x: x) < KS_LIMIT


@pytest.mark.parametrize("subset", subsets(draw()))
def test_logistic_by_kolmogorov_smirnov(subset):
    assert kolmogorov_smirnov(logistic(subsets(draw())[subset]), torch.sigmoid) < KS_LIMIT


def test_the_statistic_finds_a_distribution_that_is_a_little_wrong():
    assert kolmogorov_smirnov(draw() ** 1.03, lambda x: x) > KS_LIMIT
    assert kolmogorov_smirnov(1.05 * logistic(draw()), torch.sigmoid) > KS_LIMIT


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5, 6])
def test_moments_of_the_uniform(power):
    u = draw().double()
    expected = 1 / (power + 1)
    error = math.sqrt((1 / (2 * power + 1) - expected**2) / u.numel())
    assert float((u**power).mean()) == pytest.approx(expected, abs=5 * error)


def test_moments_of_the_logistic():
    noise = logistic(draw()).double()
    n, variance = noise.numel(), math.pi**2 / 3
    fourth = 7 * math.pi**4 / 15
    assert abs(float(noise.mean())) < 5 * math.sqrt(variance / n)
    assert float((noise**2).mean()) == pytest.approx(variance, abs=5 * math.sqrt((fourth - variance**2) / n))
    sixth_over_n = 31 * math.pi**6 / 21 / n
    assert abs(float((noise**3).mean())) < 5 * math.sqrt(sixth_over_n)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


@pytest.mark.parametrize("name", OTHERS)
def test_neighbours_are_uncorrelated(name):
    a, b = draw(), OTHERS[name]()
    limit = 5 / math.sqrt(a.numel())
    assert not torch.equal(a, b)
    assert abs(correlation(a, b)) < limit
    # Their squares, and their logarithms, would show a dependence that has no sign.
    assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < limit
    assert abs(correlation(logistic(a), logistic(b))) < limit


@pytest.mark.parametrize("name", OTHERS)
def test_pairs_of_neighbours_fill_the_square_evenly(name):
    # Chi-square over 16 x 16 cells: every kind of dependence that coarse, not only a linear one.
    cells = (draw() * 16).long() * 16 + (OTHERS[name]() * 16).long()
    counts = torch.bincount(cells.flatten(), minlength=256).double()
    expected = cells.numel() / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("bit", range(23))
def test_every_bit_is_a_fair_coin_and_independent_of_its_neighbours(bit):
    bits = ((draw() * 2.0**23).long() >> bit) & 1
    n = bits.numel()
    assert abs(float(bits.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    for a, b in ((bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1])):
        assert abs(float((a == b).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(a.numel())


def test_no_sequence_repeats_that_of_another_place():
    # A hash that lost words would give whole columns twice.
    columns = [
        tuple((uniform(seed, step, unit, torch.arange(6), torch.arange(4))[:, b] * 2**24).long().tolist())
        for seed in range(4)
        for step in range(6)
        for unit in range(6)
        for b in range(6)
    ]
    assert len(set(columns)) == len(columns)
