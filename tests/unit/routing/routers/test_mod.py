"""Mixture-of-Depths against torch.topk, and its predictor against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megaroute.routing.gate import scaled
from megaroute.routing.routers import Place
from megaroute.routing.routers.top import top_of_sequence


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 4), st.floats(0.01, 1), st.integers(0, 1000))
def test_top_of_sequence_is_that_of_topk(length, batch, density, seed):
    score = torch.randn(length, batch, generator=torch.Generator().manual_seed(seed))
    keep, lowest = top_of_sequence(score, density)
    count = max(round(density * length), 1)
    top = score.topk(count, dim=0)
    assert torch.equal(keep, torch.zeros_like(keep).scatter(0, top.indices, True))
    assert torch.equal(lowest, top.values[-1])


def test_of_equal_scores_the_earlier_is_taken():
    keep, _ = top_of_sequence(torch.tensor([[1.0], [2.0], [1.0], [1.0]]), 0.5)
    assert keep[:, 0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("density", [0.125, 0.5, 0.9])
def test_training_takes_the_top_of_each_sample(make, tokens, context, decide, density):
    router, h = make("mod", target=density), tokens(40, 3)
    top = (h @ (router.weight[1] - router.weight[0])).topk(round(density * 40), dim=0).indices
    keep = decide(router, h, context(3))
    assert [set(keep[:, b].nonzero().flatten().tolist()) for b in range(3)] == [set(i) for i in top.T.tolist()]


def test_training_is_not_causal_and_inference_is(make, tokens, context, decide):
    router, h = make("mod"), tokens(40, 3)
    changed = torch.cat((h[:20], 10 * tokens(20, 3, seed=5)))
    early = [decide(router, x, context(3))[:20] for x in (h, changed)]
    assert not torch.equal(*early)
    router.eval()
    early = [decide(router, x, context(3))[:20] for x in (h, changed)]
    assert torch.equal(*early)
    assert torch.equal(early[0], (h[:20] @ router.predictor[0]) > 0)


def test_without_a_predictor_inference_takes_the_top_as_well(make, tokens, context, decide):
    router, h = make("mod", mod={"predictor": False}), tokens(40, 3)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    training = decide(router, h, context(3))
    assert torch.equal(decide(router.eval(), h, context(3)), training)


def test_predictor_learns_by_its_mean_cross_entropy_and_the_tokens_do_not_notice(make, tokens, context):
    router = make("mod")
    h = tokens(40, 3).requires_grad_()
    logit = router.logits(h)
    keep = router.decide(logit, h, Place(), context(3)).keep_sB
    gate = router.gate(logit, keep, Place(), context(3, budget_scale=0.25))
    upstream = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((gate * upstream).sum(), (h, router.weight, router.predictor))

    predicted = (h.detach() @ router.predictor.T)[..., 0]
    entropy = 0.25 * F.binary_cross_entropy_with_logits(predicted, keep.float())
    score = torch.sigmoid(h @ (router.weight[1] - router.weight[0]))
    plain = torch.autograd.grad((score * upstream).sum() + entropy, (h, router.weight, router.predictor))
    for a, b in zip(ours, plain, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_parts_of_a_sequence_teach_the_predictor_as_much_as_the_whole(make, tokens, context, slices):
    router, h = make("mod"), tokens(24, 2)

    def gradient(pieces):
        router.zero_grad()
        for place, part in pieces:
            logit = router.logits(part)
            keep = router.decide(logit, part, place, context(2)).keep_sB
            (0.0 * router.gate(logit, keep, place, context(2))).sum().backward()
        return router.predictor.grad.clone()

    torch.testing.assert_close(gradient(slices(router, h, 4)), gradient([(Place(), h)]))


def test_router_learns_through_the_sigmoid_of_executed_tokens(make, tokens, context):
    router, h = make("mod"), tokens(40, 1)
    logit = router.logits(h)
    keep = router.decide(logit, h, Place(), context(1)).keep_sB
    rows = keep[:, 0].nonzero().flatten()
    x, out = torch.randn(len(rows), 8), torch.randn(len(rows), 8)
    y = x + scaled(out - x, router.gate(logit, keep, Place(), context(1))[rows, 0])
    (ours,) = torch.autograd.grad(y.square().sum(), router.weight)

    p = torch.sigmoid(h[rows, 0] @ (router.weight[1] - router.weight[0]))[:, None]
    (plain,) = torch.autograd.grad((x + p * (out - x)).square().sum(), router.weight)
    torch.testing.assert_close(ours, plain)


def test_imposed_decisions_teach_the_predictor_nothing(make, tokens, context):
    router, h = make("mod", force="keep_all"), tokens(40, 3)
    logit = router.logits(h)
    gate = router.gate(logit, torch.ones(40, 3, dtype=torch.bool), Place(), context(3))
    (gradient,) = torch.autograd.grad(gate.sum(), router.predictor)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gate_at_inference_is_that_of_training(make, tokens, context):
    router, h = make("mod"), tokens(40, 3)
    keep = torch.ones(40, 3, dtype=torch.bool)
    training = router.gate(router.logits(h), keep, Place(), context(3))
    inference = router.eval().gate(router.logits(h), keep, Place(), context(3))
    assert torch.equal(training, inference)
