"""Routing noise is the same number on every device, so that a run may move between them."""

import pytest
import torch

from megaroute.platform import device
from megaroute.routing.noise import logistic, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.resolve().on_cpu, reason="needs an accelerator"),
]


def draw(where: torch.device) -> torch.Tensor:
    samples_B = torch.tensor([0, 1, 77, 2**33 + 5, 2**62], device=where)
    return uniform(1234, 2**34 + 7, 19, samples_B, torch.arange(4096, device=where))


def test_uniform_numbers_are_those_of_the_processor_bit_for_bit():
    assert torch.equal(draw(device.resolve().device).cpu(), draw(torch.device("cpu")))


def test_logarithms_differ_by_rounding_alone():
    ours = logistic(draw(device.resolve().device)).cpu()
    torch.testing.assert_close(ours, logistic(draw(torch.device("cpu"))), rtol=1e-6, atol=1e-6)
