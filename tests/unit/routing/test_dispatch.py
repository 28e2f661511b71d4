import pytest
import torch

from megaroute.routing.dispatch import combine, combine_masked, gather, straight_through, take


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


def test_combine_replaces_rows_and_passes_the_others_untouched():
    x = torch.randn(4, 2, 3)
    rows, y = torch.tensor([1, 6]), torch.randn(2, 3)
    out = combine(x, rows, y)
    assert torch.equal(out.view(-1, 3)[rows], y)
    others = [row for row in range(8) if row not in (1, 6)]
    assert torch.equal(out.view(-1, 3)[others], x.view(-1, 3)[others])


def test_gather_then_combine_of_unchanged_rows_is_the_identity():
    x = torch.randn(4, 2, 3)
    rows = torch.tensor([0, 3, 5])
    assert torch.equal(combine(x, rows, gather(x, rows)), x)


def test_combine_masked_agrees_with_combine():
    x, y = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    keep = torch.rand(4, 2) < 0.5
    rows = keep.flatten().nonzero().flatten()
    assert torch.equal(combine_masked(x, keep, y), combine(x, rows, gather(y, rows)))


@pytest.mark.parametrize("kept", [0, 1, 2, None])
def test_gradient_is_that_of_taking_computing_and_replacing_row_by_row(kept):
    x, rows, upstream = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([1, 6, 1]), torch.randn(8, 3)
    if kept is None:
        rows = rows[:2]
    x_RH, rest = take(x, rows, kept)
    y_KH = (x_RH.tanh() * 3)[:kept]
    (combine(rest, rows[:kept], y_KH).view(-1, 3) * upstream).sum().backward()
    flat = x.detach().view(-1, 3).clone().requires_grad_()
    taken = rows[:kept].tolist()
    plain = torch.stack([flat[row].tanh() * 3 if row in taken else flat[row] for row in range(8)])
    (plain * upstream).sum().backward()
    torch.testing.assert_close(x.grad.view(-1, 3), flat.grad)


def test_upstream_gradient_is_left_as_it_is():
    x, rows, upstream = torch.randn(4, 2, 3, requires_grad=True), torch.tensor([1, 6]), torch.randn(4, 2, 3)
    before = upstream.clone()
    x_RH, rest = take(x, rows)
    combine(rest, rows, x_RH * 2).backward(upstream)
    assert torch.equal(upstream, before)
