import math

import torch

from megaroute.routing.noise import logistic, uniform

SAMPLES = torch.arange(64)
POSITIONS = torch.arange(512)
KNOWN = [[15349799, 2070777], [2791817, 11655759]]


def draw(seed: int = 1, step: int = 2, unit: int = 3) -> torch.Tensor:
    return uniform(seed, step, unit, SAMPLES, POSITIONS)


def test_any_slice_of_samples_or_positions_gives_the_same_numbers():
    whole = draw()
    assert torch.equal(uniform(1, 2, 3, SAMPLES[7:9], POSITIONS[100:200]), whole[100:200, 7:9])


def test_numbers_are_uniform_in_the_open_interval():
    u = draw()
    assert u.min() > 0 and u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * n)
    counts = torch.histc(u, bins=64, min=0, max=1)
    expected = n / 64
    # Chi-square with 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.2


def test_neighbours_in_every_coordinate_are_uncorrelated():
    u = draw() - 0.5
    n = u.numel()
    neighbours = [
        (u[1:], u[:-1]),
        (u[:, 1:], u[:, :-1]),
        (u, draw(seed=2) - 0.5),
        (u, draw(step=3) - 0.5),
        (u, draw(unit=4) - 0.5),
    ]
    for a, b in neighbours:
        correlation = (a * b).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(n)


def test_large_numbers_count_in_full():
    far = uniform(1, 2, 3, SAMPLES + 2**32, POSITIONS)
    assert not torch.equal(far, draw())
    assert not torch.equal(draw(seed=1 + 2**32), draw())


def test_logistic_has_the_distribution_of_the_difference_of_two_gumbels():
    noise = logistic(draw()).flatten().double()
    assert noise.isfinite().all()
    # Logistic: P(x < t) = sigmoid(t); standard error of a share is below 0.5 / sqrt(n).
    for t in (-3.0, -1.0, 0.0, 0.5, 2.0):
        share = (noise < t).double().mean()
        assert abs(share - torch.sigmoid(torch.tensor(t).double())) < 2.5 / math.sqrt(noise.numel())


def test_extreme_uniforms_give_finite_noise():
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert logistic(ends).isfinite().all()


def test_known_values_do_not_change_between_versions():
    # A resumed run must meet the noise that it would have met.
    values = uniform(1234, 5, 6, torch.tensor([7, 2**33 + 1]), torch.tensor([0, 9]))
    assert (values * 2**24).long().tolist() == KNOWN
