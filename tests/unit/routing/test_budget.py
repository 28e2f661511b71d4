import pytest
import torch

from megaroute.routing.budget import correct, pull


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
    bias, slope = torch.tensor(0.2), torch.tensor(0.0)
    correct(bias, slope, error=0.3, gain=0.5, trend=0.1)
    assert slope.item() == pytest.approx(-0.03)
    assert bias.item() == pytest.approx(0.2 - 0.03 - 0.15)


@pytest.mark.parametrize("trend, error", [(0.0, 0.1 / 4), (0.4, 0.0)])
def test_a_steady_drift_leaves_an_error_unless_the_slope_follows_it(trend, error):
    """Logits that learning moves up by 0.1 in each step, of tokens spread like the logistic noise."""
    bias, slope, drift, target = torch.tensor(0.0), torch.tensor(0.0), 0.0, 0.25
    for _ in range(300):
        density = float(torch.sigmoid(drift + bias))
        correct(bias, slope, density - target, gain=4.0, trend=trend)
        drift += 0.1
    assert density - target == pytest.approx(error, abs=1e-3)
