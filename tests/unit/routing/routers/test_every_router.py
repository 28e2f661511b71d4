"""What holds for all routers."""

import pytest
import torch

from megaroute.routing.context import UnitRecord
from megaroute.routing.routers import Place

NAMES = ("gumbel", "random", "highway", "mod", "early_exit", "random_ltd")
DRAWING = ("gumbel", "random", "early_exit", "random_ltd")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_of_the_sequence_decides_its_slice(make, tokens, context, decide, slices, name, training):
    router, h = make(name, target=0.4).train(training), tokens(24, 3)
    whole = decide(router, h, context(3))
    parts = [decide(router, part, context(3), place) for place, part in slices(router, h, 4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_decided_as_if_it_were_alone(make, tokens, context, decide, name):
    router, h = make(name, target=0.4), tokens(32, 4)
    whole = decide(router, h, context(4))
    for b in range(4):
        alone = decide(router, h[:, b : b + 1], context(1, samples_B=torch.tensor([40 + b])))
        assert torch.equal(alone, whole[:, b : b + 1])


@pytest.mark.parametrize("name", NAMES)
def test_inference_decides_from_the_token_and_its_position_alone(make, tokens, context, decide, name):
    router, h = make(name, target=0.4).eval(), tokens(64, 2)
    whole = decide(router, h, context(2))
    prefix = decide(router, h[:20], context(2, step=9, samples_B=torch.tensor([7, 8])))
    assert torch.equal(prefix, whole[:20])
    alone = decide(router, h[:, 1:], context(1, samples_B=torch.zeros(0, dtype=torch.int64)))
    assert torch.equal(alone, whole[:, 1:])


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("field", [{"seed": 4}, {"step": 6}, {"samples_B": torch.arange(50, 54)}], ids=str)
def test_training_draws_anew_for_every_seed_step_and_sample(make, tokens, context, decide, name, field):
    router, h = make(name), tokens(64, 4)
    assert torch.equal(decide(router, h, context(4)), decide(router, h, context(4)))
    assert not torch.equal(decide(router, h, context(4)), decide(router, h, context(4, **field)))


@pytest.mark.parametrize("name", DRAWING)
def test_units_draw_apart(make, tokens, context, name):
    h = tokens(64, 4)
    margins = []
    for layer in (2, 3):
        router = make(name, layer=layer)
        logit = None if router.logits(h) is None else torch.zeros(64, 4)
        margins.append(router.decide(logit, h, Place(), context(4)).margin_sB)
    assert not torch.equal(*margins)


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_have_the_higher_margins(make, tokens, context, name):
    router, h = make(name), tokens(64, 4)
    choice = router.decide(router.logits(h), h, Place(), context(4))
    margin, keep = choice.margin_sB, choice.keep_sB
    if name == "highway":  # the capacity of a unit that computes everything is never short
        assert keep.all()
        return
    assert margin[keep].min() >= 0 >= margin[~keep].max()
    assert 0 < keep.sum() < keep.numel()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["keep_all", "keep_none", "fixed_ratio"])
def test_a_debug_mode_overrules_every_router(make, tokens, context, decide, name, mode):
    router, h = make(name, target=0.25, force=mode), tokens(64, 2)
    expected = {"keep_all": 1.0, "keep_none": 0.0, "fixed_ratio": 0.25}[mode]
    assert decide(router, h, context(2)).float().mean() == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_plan_overrules_every_router_and_debug_mode(make, tokens, context, decide, slices, name):
    plan = tokens(24, 2, seed=4)[..., 0] > 0.5
    router, h = make(name, force="keep_all"), tokens(24, 2)
    replay = {router.unit.key: plan}
    assert torch.equal(decide(router, h, context(2, replay=replay)), plan)
    parts = [decide(router, part, context(2, replay=replay), place) for place, part in slices(router, h, 2)]
    assert torch.equal(torch.cat(parts), plan)


@pytest.mark.parametrize("name", NAMES)
def test_gate_is_that_of_its_own_tokens_in_whatever_order_it_is_asked(make, tokens, context, name):
    # Pipeline schedules run the forward passes of several micro-batches before the first recomputation.
    router = make(name)

    def gate_and_gradients(h, pause=lambda: None):
        h = h.clone().requires_grad_()
        router.zero_grad()
        logit = router.logits(h)
        keep = router.decide(logit, h, Place(), context(2)).keep_sB
        pause()
        gate = router.gate(logit, keep, Place(), context(2))
        if gate is None:
            return [torch.zeros(0)]
        gate.sum().backward()
        return [gate.detach(), h.grad, *(weight.grad.clone() for weight in router.parameters())]

    def another_micro_batch():
        router.logits(tokens(16, 2, seed=9))

    plain = gate_and_gradients(tokens(16, 2))
    between = gate_and_gradients(tokens(16, 2), another_micro_batch)
    assert all(torch.equal(a, b) for a, b in zip(plain, between, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_a_recorded_decision_are_those_of_the_decision(make, tokens, context, name):
    # Early exit reads the records of earlier layers, also when later ones have been written.
    router, h = make(name), tokens(16, 2)
    logit = router.logits(h)
    first = context(2)
    alive = tokens(16, 2, seed=4)[..., 0] > 0
    first.records[0] = UnitRecord(alive, None, 0)
    keep = router.decide(logit, h, Place(), first).keep_sB
    gate = router.gate(logit, keep, Place(), first)
    for key in (router.unit.key, 99):
        first.records[key] = UnitRecord(keep if key < 99 else torch.zeros_like(keep), None, 0)
    again = router.gate(logit, keep, Place(), first)
    assert (gate is None and again is None) or torch.equal(gate, again)
