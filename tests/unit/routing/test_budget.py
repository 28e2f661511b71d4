import torch

from megaroute.routing.budget import corrected_bias, pull


def test_pull_adds_the_gradient_of_the_budget_loss():
    # The straight-through density of all tokens, differentiated by autograd, is the plainer truth.
    p = torch.rand(6, 2, dtype=torch.double, requires_grad=True)
    hard = (p.detach() > 0.3).double()
    gate = hard + p - p.detach()
    plain = torch.autograd.grad(0.1 * (gate.mean() - 0.25) ** 2, p)[0]
    value = pull(p, hard.mean(), 0.25, 0.1, scale=1.0, tokens=p.numel())
    assert torch.equal(value, p)
    ours = torch.autograd.grad(value.sum(), p)[0] - 1  # the gradient of the sum itself is 1
    assert torch.allclose(ours, plain, atol=1e-12)


def test_pull_over_micro_batches_with_the_global_density_is_the_pull_over_the_whole_batch():
    p = torch.rand(8, 4, dtype=torch.double, requires_grad=True)
    density = torch.tensor(0.7, dtype=torch.double)  # of the previous step: equal for every micro-batch
    whole = torch.autograd.grad(pull(p, density, 0.5, 0.1, 1.0, p.numel()).sum(), p)[0] - 1
    halves = [pull(part, density, 0.5, 0.1, 0.5, part.numel()).sum() for part in p.split(2, dim=1)]
    assert (whole > 0).all()
    assert torch.allclose(torch.autograd.grad(sum(halves), p)[0] - 1, whole, atol=1e-12)


def test_controller_lowers_the_bias_of_a_unit_that_executes_too_much():
    bias = corrected_bias(torch.tensor(0.2), torch.tensor(0.8), target=0.5, gain=0.5)
    assert torch.isclose(bias, torch.tensor(0.05))
