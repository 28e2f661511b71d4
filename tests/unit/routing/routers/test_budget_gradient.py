"""The gradient that the budget adds to the router, against autograd of the formula as it is written."""

import pytest
import torch
from torch import Tensor

from megaroute.routing.routers import Place

WEIGHT, TARGET, SCALE = 0.7, 0.3, 0.125


def added(router, logit: Tensor, keep: Tensor, place: Place, context) -> Tensor:
    """What reaches the logits when nothing else does."""
    leaf = logit.detach().requires_grad_()
    gate = router.gate(leaf, keep, place, context)
    return torch.autograd.grad((0.0 * gate).sum(), leaf)[0]


def formula(router, logit: Tensor, keep: Tensor, context, density: str, previous: float | None) -> Tensor:
    """Gradient of WEIGHT * SCALE * (r - P)^2, where r is written out, and `previous` replaces its value if given."""
    leaf = logit.detach().requires_grad_()
    p = torch.sigmoid(router.noisy(leaf, Place(), context))
    share = p if density == "soft" else keep.float() + p - p.detach()  # a hard value, a soft gradient
    r = share.mean()
    if previous is not None:
        r = previous + r - r.detach()
    return torch.autograd.grad(WEIGHT * SCALE * (r - TARGET) ** 2, leaf)[0]


@pytest.fixture(params=["hard", "soft"])
def density(request) -> str:
    return request.param


@pytest.mark.parametrize("estimator", ["microbatch", "global"])
def test_gradient_is_that_of_the_formula(make, tokens, context, density, estimator):
    router = make("gumbel", TARGET, budget={"weight": WEIGHT, "density": density, "estimator": estimator})
    router.update(density=0.8, soft=0.6, step=4)
    h, at = tokens(32, 3), context(3, budget_scale=SCALE)
    logit = router.logits(h)
    keep = router.decide(logit, h, Place(), at).keep_sB
    previous = None if estimator == "microbatch" else {"hard": 0.8, "soft": 0.6}[density]
    expected = formula(router, logit, keep, at, density, previous)
    assert expected.abs().min() > 0
    torch.testing.assert_close(added(router, logit, keep, Place(), at), expected)


def test_a_global_budget_does_not_feel_how_the_batch_is_cut(make, tokens, context, density):
    router = make("gumbel", TARGET, budget={"weight": WEIGHT, "density": density})
    router.update(density=0.8, soft=0.6, step=4)
    h = tokens(32, 8)
    logit, keep = router.logits(h), torch.ones(32, 8, dtype=torch.bool)
    whole = added(router, logit, keep, Place(), context(8, budget_scale=1.0))
    parts = [
        added(router, logit[:, i : i + 2], keep[:, :2], Place(), at)
        for i in range(0, 8, 2)
        for at in [context(2, budget_scale=0.25, samples_B=torch.arange(40 + i, 42 + i))]
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_budget_of_micro_batches_does_feel_it(make, tokens, context, density):
    # Mean over micro-batches of (r - P)^2 is more than that of their mean: the plain formula has this in it.
    router = make("gumbel", TARGET, budget={"weight": WEIGHT, "density": density, "estimator": "microbatch"})
    h, at = tokens(32, 2), context(2)
    logit = router.logits(h) + torch.tensor([[-2.0, 2.0]])
    keep = router.decide(logit, h, Place(), at).keep_sB
    whole = added(router, logit, keep, Place(), at)
    halves = [
        added(router, logit[:, b : b + 1], keep[:, b : b + 1], Place(), part)
        for b in range(2)
        for part in [context(1, budget_scale=0.5, samples_B=torch.tensor([40 + b]))]
    ]
    assert not torch.allclose(torch.cat(halves, 1), whole, rtol=0.05)


@pytest.mark.parametrize("estimator", ["microbatch", "global"])
def test_ranks_of_a_sequence_pull_as_one(make, tokens, context, density, estimator):
    router = make("gumbel", TARGET, budget={"weight": WEIGHT, "density": density, "estimator": estimator})
    router.update(density=0.8, soft=0.6, step=4)
    h, at = tokens(24, 2), context(2)
    logit = router.logits(h)
    keep = router.decide(logit, h, Place(), at).keep_sB
    whole = added(router, logit, keep, Place(), at)
    measured = keep.float() if density == "hard" else router.probability(logit.detach(), Place(), at)
    parts = [
        added(router, part, kept, Place(chunk, 3, lambda _: measured), at)
        for chunk, (part, kept) in enumerate(zip(logit.chunk(3), keep.chunk(3), strict=True))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_pull_follows_an_annealed_target(make, tokens, context):
    router = make("gumbel", TARGET, budget={"weight": WEIGHT}, density_anneal={"start": 1.0, "steps": 10})
    router.update(density=0.6, step=0)
    h, keep = tokens(16, 2), torch.ones(16, 2, dtype=torch.bool)
    start, end = (added(router, router.logits(h), keep, Place(), context(2, step=step)) for step in (0, 10))
    assert (start < 0).all(), "0.6 is too little for a target of 1"
    assert (end > 0).all(), "and too much for 0.3"


@pytest.mark.parametrize("training, weight", [(False, WEIGHT), (True, 0.0)])
def test_nothing_is_added_at_inference_or_without_weight(make, tokens, context, training, weight):
    router = make("gumbel", TARGET, budget={"weight": weight}).train(training)
    router.update(density=0.8, step=4)
    h, keep = tokens(16, 2), torch.ones(16, 2, dtype=torch.bool)
    gradient = added(router, router.logits(h), keep, Place(), context(2))
    assert torch.equal(gradient, torch.zeros_like(gradient))
