"""Routing noise as a function: what it depends on, and its known values.  Its statistics have a file of their own."""

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


def test_numbers_lie_in_the_open_interval_on_a_grid_that_float32_holds():
    u = draw()
    assert u.min() > 0 and u.max() < 1
    assert torch.equal((u * 2**24).round() * 2.0**-24, u)


def test_large_numbers_count_in_full():
    far = uniform(1, 2, 3, SAMPLES + 2**32, POSITIONS)
    assert not torch.equal(far, draw())
    assert not torch.equal(draw(seed=1 + 2**32), draw())


def test_extreme_uniforms_give_finite_noise():
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert logistic(ends).isfinite().all()


def mixed(x: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def plain(seed: int, step: int, unit: int, sample: int, position: int) -> float:
    """The definition in whole numbers without bounds: what every device computes, as its steps are exact."""
    golden, key = 0x9E3779B9, 0
    for word in (seed, step, unit, sample):
        for half in (word % 2**32, word >> 32):
            key = mixed((key + half + golden) % 2**32)
    x = mixed(mixed((key + (position + 1) * golden) % 2**32) ^ key)
    return ((x >> 9) + 0.5) / 2**23


def test_numbers_are_those_of_plain_arithmetic_bit_for_bit():
    samples, positions = [0, 1, 2**31, 2**32 + 5, 2**63 - 1], [0, 1, 31, 4095, 2**31]
    for seed, step, unit in ((0, 0, 0), (1234, 7, 95), (2**63 - 1, 2**40, 2**20)):
        ours = uniform(seed, step, unit, torch.tensor(samples), torch.tensor(positions))
        assert ours.tolist() == [[plain(seed, step, unit, s, p) for s in samples] for p in positions]


def test_known_values_do_not_change_between_versions():
    # A resumed run must meet the noise that it would have met.
    values = uniform(1234, 5, 6, torch.tensor([7, 2**33 + 1]), torch.tensor([0, 9]))
    assert (values * 2**24).long().tolist() == KNOWN
