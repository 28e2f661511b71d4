"""Routed layers against the formulas, written out: every router, unit and dispatch, output and every gradient."""

import pytest
import torch
from layers import assert_close, config_of, context_of, input_of, layer_of, run, upstream_of
from plain_layer import PlainLayer

UNITS = ("layer", "attention", "mlp", "separate")
ROUTERS = {
    "gumbel": {},
    "st_sigmoid": {"estimator": "st_sigmoid", "temperature": 0.7},
    "temperature": {"temperature": 2.0, "budget": {"weight": 30.0}},
    "second_order": {"benefit": "second_order"},
    "probability": {"gate": "probability"},
    "random": {"router": "random"},
    "highway": {"router": "highway"},
    "mod": {"router": "mod"},
    "random_ltd": {"router": "random_ltd"},
}
MODES = {
    "exact": {"dispatch": {"mode": "exact"}},
    "masked": {"dispatch": {"mode": "masked"}},
    "capacity 32 of 48": {"dispatch": {"mode": "capacity"}, "capacity": {"factor": 1.6}},
    "capacity 48 of 48": {"dispatch": {"mode": "capacity"}, "capacity": {"factor": 2.5}},
    "pooled": {"dispatch": {"mode": "capacity"}, "capacity": {"factor": 1.6, "scope": "stage"}},
}
SHAPES = {
    "multi-head": {"num_kv_heads": 4},
    "wide heads": {"num_attention_heads": 2, "head_dim": 64, "num_kv_heads": 1, "activation": "geglu"},
    "plain gelu": {"activation": "gelu"},
}


def check(config, training: bool = True) -> None:
    layer = layer_of(config).train(training)
    for name, weight in layer.named_parameters():
        if name.endswith("predictor"):  # so that it executes some tokens
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(2))
    x = input_of()
    ours = run(layer, x)

    weights = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    plain = PlainLayer(config, weights, context_of(), training)
    x = x.double().requires_grad_()
    y = plain.forward(x)
    ((y * upstream_of(y)).sum() + plain.aside).backward()
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}

    for mine, theirs in zip(ours.routing.records.values(), plain.keep_SB.values(), strict=True):
        assert torch.equal(mine.keep_SB, theirs)
        share = float(theirs.float().mean())
        assert 0.2 < share < 0.8 or config.routing.router in ("highway", "random_ltd"), "the case says little"
    assert_close({"output": ours.y}, {"output": y.detach()}, 2e-6)
    # A router learns from Block(x) - x, which is small beside x: a difference of two float32 numbers of its size.
    assert_close(ours.gradients, {"input": x.grad, **gradients}, 1e-4)


# A highway computes every token, whatever the capacity.
PAIRS = [(router, mode) for router in ROUTERS for mode in MODES if router != "highway" or mode in ("exact", "masked")]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("router, mode", PAIRS)
def test_every_router_and_unit_in_every_dispatch_is_the_formula(router, unit, mode):
    check(config_of(density=0.4, unit=unit, **MODES[mode], **ROUTERS[router]))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("router", ROUTERS)
def test_inference_is_the_formula(router, unit):
    check(config_of(density=0.4, unit=unit, **ROUTERS[router]), training=False)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("estimator", ["st_gumbel", "st_sigmoid"])
def test_gradient_of_all_tokens_is_that_of_the_textbook(unit, estimator):
    check(config_of(gradient="all", estimator=estimator, unit=unit, dispatch={"mode": "masked"}))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("unit", ["layer", "separate"])
def test_every_shape_is_the_formula(shape, unit):
    check(config_of(shape, density=0.4, unit=unit))
