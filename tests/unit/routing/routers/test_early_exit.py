"""Early exit: a token that stops stays stopped."""

from itertools import pairwise

import pytest
import torch

from megaroute.routing.context import UnitRecord
from megaroute.routing.routers import Place


def stack(make, tokens, context, training: bool):
    """Layers 0, 2, 3 and 7 on tokens of their own; the context with their records, and what each would have decided."""
    at, own = context(3), []
    for layer in (0, 2, 3, 7):
        router, h = make("early_exit", target=0.8, layer=layer).train(training), tokens(64, 3, seed=layer)
        logit = router.logits(h) + 1.0
        choice = router.decide(logit, h, Place(), at)
        at.records[router.unit.key] = UnitRecord(choice.keep_sB, choice.margin_sB, 0)
        gumbel = make("gumbel", target=0.8, layer=layer).train(training)
        own.append(gumbel.decide(logit, h, Place(), context(3)).keep_sB)
    return at, own


@pytest.mark.parametrize("training", [True, False])
def test_a_stopped_token_never_comes_back(make, tokens, context, training):
    at, own = stack(make, tokens, context, training)
    alive = torch.ones(64, 3, dtype=torch.bool)
    for record, wish in zip(at.records.values(), own, strict=True):
        assert torch.equal(record.keep_SB, alive & wish)
        alive = record.keep_SB
    assert 0 < alive.sum() < own[-1].sum()


def test_a_stopped_token_is_below_every_threshold(make, tokens, context):
    at, _ = stack(make, tokens, context, training=True)
    records = list(at.records.values())
    for before, record in pairwise(records):
        assert (record.margin_SB[~before.keep_SB] <= -1).all()


def test_the_budget_pulls_at_tokens_that_could_still_go_on_and_at_no_other(make, tokens, context):
    router, h = make("early_exit", budget={"weight": 2.0}), tokens(64, 3)
    router.state.density.fill_(0.9)
    at = context(3)
    alive = torch.rand(64, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    at.records[0] = UnitRecord(alive, None, 0)
    logit = router.logits(h).detach().requires_grad_()
    gate = router.gate(logit, alive, Place(), at)
    assert torch.equal(gate[~alive], torch.zeros_like(gate[~alive]))
    assert (gate[alive] > 0).all()
    (gradient,) = torch.autograd.grad((0.0 * gate).sum(), logit)
    assert torch.equal(gradient[~alive], torch.zeros_like(gradient[~alive]))
    p = gate.detach()[alive]
    torch.testing.assert_close(gradient[alive], 2 * 2.0 * (0.9 - 0.5) / (64 * 3) * p * (1 - p))


def test_the_first_routed_layer_is_that_of_the_method(make, tokens, context, decide):
    h = tokens(64, 3)
    assert torch.equal(decide(make("early_exit"), h, context(3)), decide(make("gumbel"), h, context(3)))
