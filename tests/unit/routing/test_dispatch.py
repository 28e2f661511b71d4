import torch

from megaroute.routing.dispatch import combine, combine_masked, gather, straight_through


def test_straight_through_returns_the_block_bit_for_bit():
    out, x, p = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    assert torch.equal(straight_through(out, x, p), out)


def test_straight_through_gradient_is_that_of_a_hard_gate_with_a_soft_gradient():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    p = torch.rand(6, dtype=torch.double, requires_grad=True)
    upstream = torch.randn(6, 4, dtype=torch.double)

    def grads(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((y * upstream).sum(), (x, w, p))

    ours = grads(straight_through(torch.tanh(x @ w), x, p))
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


def test_gradient_of_a_replaced_row_goes_to_its_replacement_only():
    x, y = torch.randn(4, 2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    rows, upstream = torch.tensor([1, 6]), torch.randn(8, 3)
    (combine(x, rows, y).view(-1, 3) * upstream).sum().backward()
    assert torch.equal(y.grad, upstream[rows])
    untouched = torch.ones(8, 1).index_fill(0, rows, 0.0)
    assert torch.equal(x.grad.view(-1, 3), upstream * untouched)
