"""RMSNorm against its formula, written with autograd."""

import pytest
import torch
from torch import Tensor

from megaroute.model.norm import rms_norm


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 12, generator=generator, dtype=torch.double) * 3
    x[0, 0] = 1e-4  # where eps matters
    weight = torch.rand(12, generator=generator, dtype=torch.double)
    return x.requires_grad_(), weight.requires_grad_()


def test_output_and_gradients_are_those_of_the_formula(inputs):
    x, weight = inputs
    ours, plain = rms_norm(x, weight, 1e-5), formula(x, weight, 1e-5)
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad((y * upstream).sum(), inputs) for y in (ours, plain)]
    torch.testing.assert_close(*grads)


def test_gradcheck(inputs):
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), inputs)


def test_bfloat16_rounds_once_and_keeps_statistics_in_float32(inputs):
    x, weight = (t.detach().bfloat16().requires_grad_() for t in inputs)
    wide = [t.detach().float().requires_grad_() for t in (x, weight)]
    ours, plain = rms_norm(x, weight, 1e-5), formula(*wide, 1e-5)
    assert ours.dtype == torch.bfloat16
    # Sums of 12 terms may be taken in another order, which can move a value across the border of two roundings.
    torch.testing.assert_close(ours.float(), plain, rtol=2**-8, atol=0)
    upstream = torch.randn_like(plain)
    grads = torch.autograd.grad((ours.float() * upstream).sum(), (x, weight))
    grads_plain = torch.autograd.grad((plain * upstream.bfloat16().float()).sum(), wide)
    for ours, plain in zip(grads, grads_plain, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), plain, rtol=2**-7, atol=1e-6)


def test_compiles_without_a_break(inputs):
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*inputs, 1e-5), rms_norm(*inputs, 1e-5)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, plain)]
    torch.testing.assert_close(*grads)
