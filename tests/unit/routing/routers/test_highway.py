"""The soft gate of highway networks."""

import torch

from megaroute.routing.routers import Place


def test_everything_is_computed_and_weighed_by_a_sigmoid_without_noise(make, tokens, context, decide):
    router, h = make("highway"), tokens(32, 3)
    skip, execute = (h @ router.weight.T).unbind(-1)
    logit = router.logits(h)
    keep = decide(router, h, context(3))
    assert keep.all()
    assert router.multiplies
    for training in (True, False):
        gate = router.train(training).gate(logit, keep, Place(), context(3))
        torch.testing.assert_close(gate, torch.sigmoid(execute - skip))


def test_no_budget_pulls_at_the_gate(make, tokens, context):
    router = make("highway", target=0.1, budget={"weight": 5.0, "estimator": "microbatch"})
    logit = router.logits(tokens(32, 3)).detach().requires_grad_()
    gate = router.gate(logit, torch.ones(32, 3, dtype=torch.bool), Place(), context(3))
    (gradient,) = torch.autograd.grad(gate.sum(), logit)
    p = torch.sigmoid(logit.detach())
    torch.testing.assert_close(gradient, p * (1 - p))
