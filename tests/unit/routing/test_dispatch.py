import pytest
import torch

from megaroute.routing.dispatch import combine, combine_masked, gather, take


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
