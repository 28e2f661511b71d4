"""Finite differences in float64, of everything on the way of a gradient that has a true derivative."""

import torch
from torch import Tensor
from torch.autograd import gradcheck

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.budget import pull
from megaroute.routing.context import RoutingContext
from megaroute.routing.dispatch import combine, combine_masked, take
from megaroute.routing.experts import gates
from megaroute.routing.gate import Gate, scaled
from megaroute.routing.routers import Place, build_router


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.double, generator=generator).requires_grad_()


def test_scaled():
    assert gradcheck(scaled, (draw(5, 3), draw(5, seed=2)))


def test_take_and_combine():
    rows = torch.tensor([1, 2, 5, 7])

    def through(x: Tensor, y: Tensor) -> Tensor:
        x_RH, rest = take(x, rows)
        return combine(rest, rows, torch.tanh(x_RH) * y)

    assert gradcheck(through, (draw(4, 2, 3), draw(4, 3, seed=1)))


def test_combine_masked():
    keep = torch.tensor([[True, False], [False, True], [True, True]])
    assert gradcheck(lambda x, y: combine_masked(x, keep, y), (draw(3, 2, 4), draw(3, 2, 4, seed=1)))


def test_highway():
    router = build_router(RoutingConfig(router="highway"), Unit(0, "layer"), 0.5, 8)
    keep = torch.ones(6, 1, dtype=torch.bool)

    def through(logit: Tensor, x: Tensor, branch: Tensor) -> Tensor:
        gate = router.gate(logit, keep, Place(), RoutingContext())
        assert gate is not None
        return Gate(gate[:, 0], multiplies=True)(x, branch)

    assert gradcheck(through, (draw(6, 1), draw(6, 4, seed=1), draw(6, 4, seed=2)))


def test_gates_of_experts():
    chosen = torch.tensor([[[True, True, False]], [[False, True, True]]])
    for top_k in (1, 2):
        assert gradcheck(lambda z, k=top_k: gates(z.softmax(-1), chosen, k), (draw(2, 1, 3),))


def test_pull_is_the_slope_of_the_soft_budget():
    # The budget's value travels nowhere, so its gradient is compared with differences of the formula itself.
    p, c = torch.rand(7, 2, dtype=torch.double, requires_grad=True), draw(7, 2, seed=1).detach()

    def loss(p: Tensor) -> Tensor:
        return (c * p).sum() + 0.3 * 0.5 * (p.mean() - 0.25) ** 2

    (slope,) = torch.autograd.grad((c * pull(p, p.mean(), 0.25, 0.3, scale=0.5, tokens=p.numel())).sum(), p)
    step = 1e-6
    for index in range(p.numel()):
        shift = torch.zeros(p.numel(), dtype=torch.double).index_fill(0, torch.tensor([index]), step).view_as(p)
        difference = (loss(p.detach() + shift) - loss(p.detach() - shift)) / (2 * step)
        torch.testing.assert_close(slope.flatten()[index], difference, rtol=1e-6, atol=1e-9)
