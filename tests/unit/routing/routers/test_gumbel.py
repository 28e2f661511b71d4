"""The method's router: its decisions, its probability, and what it remembers."""

import math

import pytest
import torch

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.noise import logistic, uniform
from megaroute.routing.routers import Place
from megaroute.routing.routers.gumbel import GumbelRouter
from megaroute.routing.state import initial_std


def test_logit_is_execute_minus_skip_plus_the_correction(make, tokens):
    router, h = make("gumbel"), tokens(5, 3)
    skip, execute = (h @ router.weight.T).unbind(-1)
    torch.testing.assert_close(router.logits(h), execute - skip)
    router.state.bias.fill_(0.25)
    torch.testing.assert_close(router.logits(h), execute - skip + 0.25)


def test_logits_are_float32_in_a_model_of_lower_precision(make, tokens):
    router, h = make("gumbel").bfloat16(), tokens(5, 3).bfloat16()
    skip, execute = (h.float() @ router.weight.float().T).unbind(-1)
    assert router.logits(h).dtype == torch.float32
    torch.testing.assert_close(router.logits(h), execute - skip)


def test_initial_logits_have_the_asked_spread_whatever_the_width():
    generator = torch.Generator().manual_seed(0)
    for hidden in (64, 1024):
        router = GumbelRouter(RoutingConfig(), Unit(3, "layer"), 0.5, hidden, torch.float32)
        std = initial_std(1.5, hidden)
        spreads = []
        for _ in range(20):
            torch.nn.init.normal_(router.weight, std=std, generator=generator)
            spreads.append(router.logits(torch.randn(500, 1, hidden, generator=generator)).std().item())
        assert abs(sum(spreads) / len(spreads) - 1.5) < 0.15


def test_inference_decides_by_the_sign_of_the_logit(make, tokens, context, decide):
    router, h = make("gumbel").eval(), tokens(64, 3)
    assert torch.equal(decide(router, h, context(3)), router.logits(h) > 0)
    gate = router.gate(router.logits(h), decide(router, h, context(3)), Place(), context(3))
    torch.testing.assert_close(gate, torch.sigmoid(router.logits(h)))


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_training_executes_with_the_probability_of_the_softmax(make, context, logit):
    # The Gumbel-max trick: the argmax of perturbed logits is a draw from their softmax.
    shape = (4096, 16)
    margin = make("gumbel").noisy(torch.full(shape, logit), Place(), context(16))
    p = 1 / (1 + math.exp(-logit))
    assert float((margin > 0).float().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / (4096 * 16)))


def test_decision_and_probability_meet_the_same_noise(make, tokens, context):
    router, h = make("gumbel", layer=4), tokens(64, 3)
    noise = logistic(uniform(3, 5, 8, torch.arange(40, 43), torch.arange(64)))
    logit = router.logits(h)
    choice = router.decide(logit, h, Place(), context(3))
    torch.testing.assert_close(choice.margin_sB, logit + noise)
    gate = router.gate(logit, choice.keep_sB, Place(), context(3))
    torch.testing.assert_close(gate, torch.sigmoid(logit + noise))
    assert torch.equal(gate > 0.5, choice.keep_sB)


def test_the_other_estimator_leaves_the_noise_out_of_the_probability_alone(make, tokens, context, decide):
    plain, other, h = make("gumbel"), make("gumbel", estimator="st_sigmoid"), tokens(64, 3)
    keep = decide(plain, h, context(3))
    assert torch.equal(decide(other, h, context(3)), keep)
    gate = other.gate(other.logits(h), keep, Place(), context(3))
    torch.testing.assert_close(gate, torch.sigmoid(other.logits(h)))


@pytest.mark.parametrize("step, temperature", [(0, 3.0), (5, 2.0), (10, 1.0), (99, 1.0)])
def test_temperature_follows_its_schedule_and_divides_noise_and_logit(make, tokens, context, step, temperature):
    router, h = make("gumbel", temperature_anneal={"start": 3.0, "steps": 10}), tokens(64, 3)
    logit, at = router.logits(h), context(3, step=step)
    margin = router.decide(logit, h, Place(), at).margin_sB
    gate = router.gate(logit, margin > 0, Place(), at)
    torch.testing.assert_close(gate, torch.sigmoid(margin / temperature))


@pytest.mark.parametrize("step, factor", [(0, 1.0), (5, 0.6), (10, 0.2), (99, 0.2)])
def test_noise_follows_its_schedule(make, tokens, context, step, factor):
    router, h = make("gumbel", noise=0.2, noise_anneal={"start": 1.0, "steps": 10}), tokens(64, 3)
    logit, at = router.logits(h), context(3, step=step)
    noise = logistic(router.uniform(64, 3, Place(), at, h.device))
    torch.testing.assert_close(router.decide(logit, h, Place(), at).margin_sB, logit + factor * noise)


def test_without_noise_training_decides_as_inference_does(make, tokens, context, decide):
    router, h = make("gumbel", noise=0.0), tokens(64, 3)
    assert torch.equal(decide(router, h, context(3)), router.logits(h) > 0)


@pytest.mark.parametrize("gate, multiplies", [("straight_through", False), ("probability", True)])
def test_the_branch_is_multiplied_by_the_probability_if_asked(make, gate, multiplies):
    assert make("gumbel", gate=gate).multiplies is multiplies


@pytest.mark.parametrize("force", [None, "keep_all"])
def test_imposed_decisions_teach_nothing_but_take_part_in_the_backward_pass(make, tokens, context, force):
    router, h = make("gumbel", force=force, budget={"weight": 3.0}), tokens(8, 2)
    keep = torch.ones(8, 2, dtype=torch.bool)
    at = context(2, replay={} if force else {router.unit.key: keep})
    gate = router.gate(router.logits(h), keep, Place(), at)
    (gradient,) = torch.autograd.grad(gate.sum(), router.weight)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_state_keeps_float32_when_the_model_is_cast(make):
    router = make("gumbel", controller={"gain": 0.1})
    router.update(density=0.123456789, step=0)
    density, bias = router.state.density.clone(), router.state.bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.state.density.dtype == torch.float32
    assert torch.equal(router.state.density, density) and torch.equal(router.state.bias, bias)


def test_update_remembers_the_density_and_corrects_the_bias(make):
    router = make("gumbel", controller={"gain": 0.2})
    router.update(density=0.75, step=0)
    assert router.state.density.item() == 0.75
    assert abs(router.state.bias.item() + 0.05) < 1e-7


def test_a_soft_budget_remembers_the_probability_and_the_controller_still_corrects_the_decisions(make):
    router = make("gumbel", budget={"density": "soft"}, controller={"gain": 0.2})
    router.update(density=0.75, step=0, soft=0.25)
    assert router.state.density.item() == 0.25
    assert abs(router.state.bias.item() + 0.05) < 1e-7


@pytest.mark.parametrize("name", ["gumbel", "early_exit"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.85])
def test_controller_holds_the_density_within_one_percent_of_the_target(make, tokens, context, decide, name, target):
    router, h = make(name, target=target, controller={"gain": 0.5}), tokens(256, 64)
    densities = []
    for step in range(240):
        drift = 0.01 * min(step, 100)  # what the router's own learning does to the logits meanwhile
        with torch.no_grad():
            logit = router.logits(h) + drift
            keep = router.decide(logit, h, Place(), context(64, step=step)).keep_sB
        densities.append(float(keep.float().mean()))
        router.update(densities[-1], step)
    assert abs(densities[0] - target) > 0.01 * target or target == 0.5
    assert sum(densities[-60:]) / 60 == pytest.approx(target, rel=0.01)
    assert router.state.bias.item() != 0


def test_controller_follows_a_density_that_is_annealed(make, tokens, context):
    router = make("gumbel", density_anneal={"start": 1.0, "steps": 100}, controller={"gain": 0.5})
    router.update(density=0.6, step=60)  # the target is 0.7 there
    assert router.state.bias.item() == pytest.approx(0.05)
