"""Routers that do not look at the tokens, against what they promise."""

import math

import pytest
import torch

from megaroute.routing.routers import Place


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.875, 1.0])
def test_random_executes_each_token_with_the_target_probability(make, tokens, context, decide, density, training):
    router, h = make("random", target=density).train(training), tokens(4096, 4)
    keep = decide(router, h, context(4)).float()
    seen = keep if training else keep[:, :1]  # at inference samples share their numbers
    error = math.sqrt(density * (1 - density) / seen.numel())
    assert abs(float(seen.mean()) - density) <= 5 * error


@pytest.mark.parametrize("name", ["random", "random_ltd"])
def test_decisions_have_nothing_to_do_with_the_tokens(make, tokens, context, decide, name):
    router = make(name)
    assert router.logits(tokens(4, 1)) is None
    assert list(router.parameters()) == []
    assert torch.equal(decide(router, tokens(64, 4), context(4)), decide(router, tokens(64, 4, seed=1), context(4)))
    assert router.gate(None, torch.ones(64, 4, dtype=torch.bool), Place(), context(4)) is None


@pytest.mark.parametrize("length, density", [(64, 0.5), (64, 0.1), (50, 0.333), (7, 0.9), (16, 1.0), (16, 0.01)])
def test_random_ltd_takes_equally_many_of_every_sample(make, tokens, context, decide, length, density):
    router, h = make("random_ltd", target=density), tokens(length, 5)
    count = max(round(density * length), 1)
    for step in range(20):
        assert decide(router, h, context(5, step=step)).sum(0).tolist() == [count] * 5


def test_random_ltd_takes_every_position_equally_often(make, tokens, context, decide):
    router, h = make("random_ltd", target=0.25), tokens(16, 64)
    steps = 200
    taken = sum(decide(router, h, context(64, step=step)).float().sum(1) for step in range(steps))
    shares = taken / (64 * steps)
    # Of 4 among 16 without replacement, each position is a coin of 1 in 4.
    assert (shares - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / (64 * steps))


def test_random_ltd_computes_everything_at_inference(make, tokens, context, decide):
    assert decide(make("random_ltd", target=0.25).eval(), tokens(32, 3), context(3)).all()


@pytest.mark.parametrize("step, density", [(0, 1.0), (10, 1.0), (20, 0.75), (30, 0.5), (500, 0.5)])
def test_density_follows_its_schedule(make, tokens, context, decide, step, density):
    schedule = {"start": 1.0, "steps": 20, "after": 10}
    h = tokens(400, 2)
    ltd = make("random_ltd", density_anneal=schedule)
    assert decide(ltd, h, context(2, step=step)).sum(0).tolist() == [400 * density] * 2
    drawn = decide(make("random", density_anneal=schedule), h, context(2, step=step)).float().mean()
    assert abs(float(drawn) - density) <= 5 * math.sqrt(density * (1 - density) / 800)
