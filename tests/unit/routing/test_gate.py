from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megaroute.routing.gate import Gate, scaled, straight_through


def test_straight_through_adds_the_whole_branch():
    x, branch, p = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    assert torch.equal(straight_through(x, branch, p), x + branch)


def test_gate_gradient_keeps_its_digits_in_bfloat16():
    # A branch much smaller than the residual stream, as in deep models: x + branch - x would have one or two digits.
    generator = torch.Generator().manual_seed(0)
    x, branch, upstream = (torch.randn(4, 256, generator=generator) for _ in range(3))
    x, branch = (30 * x).bfloat16(), (0.05 * branch).bfloat16()
    p = torch.rand(4, requires_grad=True)
    (ours,) = torch.autograd.grad((straight_through(x, branch, p).float() * upstream).sum(), p)
    plain = (upstream.bfloat16().double() * branch.double()).sum(-1)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_factor_keeps_its_digits_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    branch, upstream = (torch.randn(64, 256, generator=generator).bfloat16() for _ in range(2))
    gate = torch.rand(64, requires_grad=True)
    (ours,) = torch.autograd.grad((scaled(branch, gate).float() * upstream).sum(), gate)
    torch.testing.assert_close(ours.double(), (upstream.double() * branch.double()).sum(-1), rtol=1e-4, atol=1e-4)


def test_straight_through_gradient_is_that_of_a_hard_gate_with_a_soft_gradient():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    p = torch.rand(6, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(6, 4, dtype=torch.double)

    def grads(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((y * upstream).sum(), (x, w, p))

    ours = grads(straight_through(x, torch.tanh(x @ w) - x, p))
    gate = (1 + p - p.detach())[:, None]  # the textbook form, y = x + g * (Block(x) - x)
    plain = grads(x + gate * (torch.tanh(x @ w) - x))
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def slope_and_benefit(loss: Callable[[Tensor], Tensor], branch: Tensor, curvature: float) -> Tensor:
    """The gradient that the router gets in a sum of losses, one of each row, at x = 0."""
    x, p = torch.zeros_like(branch), torch.rand(len(branch), dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(straight_through(x, branch, p, curvature)), p)
    return gradient


def test_second_order_adds_half_the_square_of_the_slope_of_the_summed_loss():
    torch.manual_seed(0)
    branch, upstream, tokens, scale = 0.3 * torch.randn(6, 4), 0.3 * torch.randn(6, 4), 60, 512.0
    slopes = (upstream * branch).sum(-1).double()  # of the sum over the tokens

    def mean_loss(y: Tensor) -> Tensor:
        return scale / tokens * (y * upstream).sum()

    ours = slope_and_benefit(mean_loss, branch, tokens / scale)
    torch.testing.assert_close(ours, scale / tokens * (slopes - slopes**2 / 2), rtol=1e-5, atol=1e-5)


def test_second_order_trusts_no_slope_beyond_one_nat():
    """Squares of steep tokens once grew the gradient norm a millionfold, and clipping it stopped all learning."""
    slopes = torch.tensor([-1e4, -3.0, -1.0, 1.0, 3.0, 1e4])
    branch, tokens, scale = slopes[:, None], 60, 512.0
    ours = slope_and_benefit(lambda y: scale / tokens * y.sum(), branch, tokens / scale)
    expected = scale / tokens * torch.tensor([-1.5, -1.5, -1.5, 0.5, 0.5, 0.5], dtype=torch.double)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_second_order_ranks_tokens_by_what_executing_them_is_worth():
    """Branches of the best size for each class of tokens: the slope is blind to what they are worth."""
    torch.manual_seed(0)
    tokens, classes = 40_000, 4
    gain = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.double)[torch.arange(tokens) % classes]
    # A logit of gain for the likelier of two outcomes, which comes with just the probability that the logit says.
    outcome = torch.where(torch.rand(tokens, dtype=torch.double) < torch.sigmoid(gain), 1.0, -1.0)

    def losses(logit: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-outcome * logit)

    worth = losses(torch.zeros(tokens, dtype=torch.double)) - losses(gain)
    first, second = (slope_and_benefit(lambda y: losses(y[:, 0]).sum(), gain[:, None], c) for c in (0.0, 1.0))

    def of_class(values: Tensor) -> Tensor:
        return values.view(-1, classes).mean(0)

    assert of_class(first).abs().max() < 0.03 < of_class(worth).max()
    torch.testing.assert_close(of_class(-second)[:3], of_class(worth)[:3], rtol=0.1, atol=0.01)
    assert of_class(-second).diff().min() > 0 and of_class(worth).diff().min() > 0


@pytest.mark.parametrize("gate", [Gate(None), Gate(torch.rand(8)), Gate(torch.rand(8), multiplies=True)])
def test_rows_of_a_gate_are_those_of_the_whole(gate):
    x, branch, rows = torch.randn(8, 3), torch.randn(8, 3), torch.tensor([1, 5, 6])
    assert torch.equal(gate.rows(rows)(x[rows], branch[rows]), gate(x, branch)[rows])
