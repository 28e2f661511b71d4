"""Standard errors, rank correlation and bootstrap against values worked out another way."""

import math

import numpy as np
import pytest

from megaroute.evaluation.statistics import interval, ranks, ratio, spearman


def test_ratio_of_equal_weights_is_the_mean_with_its_usual_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    value, error = ratio(values, np.ones(4))
    assert value == 4.0
    assert error == pytest.approx(values.std(ddof=1) / 2)


def test_error_of_a_ratio_is_that_of_repeated_samples():
    draw = np.random.default_rng(0)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        weights = draw.uniform(1, 5, 400)
        return weights * draw.normal(2, 0.5, 400), weights

    values = [ratio(*sample())[0] for _ in range(400)]
    _, error = ratio(*sample())
    assert error == pytest.approx(np.std(values), rel=0.15)


def test_one_unit_has_no_error():
    assert ratio(np.array([6.0]), np.array([3.0])) == (2.0, None)


def test_equal_values_share_their_rank():
    assert ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_rank_correlation():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    # By the formula 1 - 6 sum(d^2) / (n (n^2 - 1)) for values without ties.
    assert spearman(x, np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(1 - 6 * 4 / 60)
    assert math.isnan(spearman(x, np.ones(4)))


def test_bootstrap_interval_covers_the_mean_and_is_a_function_of_the_seed():
    values = np.random.default_rng(1).normal(size=500)

    def mean(chosen: np.ndarray) -> float:
        return float(values[chosen].mean())

    low, high = interval(mean, 500, seed=0)
    assert (low, high) == interval(mean, 500, seed=0) != interval(mean, 500, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(500), rel=0.15)
