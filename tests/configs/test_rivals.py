"""The rivals differ in how they spend FLOPs, not in how many, nor in what they are trained on."""

from fractions import Fraction
from pathlib import Path

import pytest

from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.model.flops import UnitWork, causal_pairs, executed_forward

FOLDER = Path(__file__).resolve().parents[2] / "pretrain_configs" / "rivals"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BASELINE = "dense-effective"
SAME_COST = [name for name in NAMES if name not in (BASELINE, "dense-deep")]
SKIPPING = ["skip", "skip-first-order", "skip-published", "random", "mod", "early_exit", "random_ltd"]


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


def flops_per_token(config: Config) -> float:
    """Of a forward pass that meets its targets, every executed token with the mean number of keys."""
    routing, length = config.routing, config.data.sequence_length
    work = []
    for unit, target in zip(config.units, routing.targets(config.model.num_layers), strict=True):
        share = Fraction(1) if routing.router == "highway" else Fraction(target)
        rows, pairs = round(length * share), round(causal_pairs(1, length) * share)
        if routing.router == "moe":
            rows, pairs = length * routing.moe.top_k, 0
        work.append(UnitWork(unit, kept=rows, rows=rows, pairs=pairs, needed_pairs=pairs))
    return sum(executed_forward(config.model, routing, 1, length, work).values()) / length


def test_every_router_has_its_rival():
    routers = set(Config.model_fields["routing"].annotation.model_fields["router"].annotation.__args__)
    assert {load(name).routing.router for name in NAMES} == routers
    assert {"skip", "skip-published", "dense-deep", "dense-narrow", "wide-ffn", "moe-top2"} < set(NAMES)


@pytest.mark.parametrize("name", SAME_COST)
def test_rival_executes_as_many_flops_as_the_baseline(name):
    assert flops_per_token(load(name)) == pytest.approx(flops_per_token(load(BASELINE)), rel=0.02)


def test_only_the_deep_model_costs_more_and_by_as_much_as_it_is_deeper():
    deep, baseline = load("dense-deep"), load(BASELINE)
    assert flops_per_token(deep) > 1.5 * flops_per_token(baseline)
    assert deep.model.model_copy(update={"num_layers": baseline.model.num_layers}) == baseline.model
    assert deep.model.num_layers == load("skip").model.num_layers


@pytest.mark.parametrize("name", SKIPPING)
def test_skipping_rival_executes_the_layers_of_the_baseline(name):
    config = load(name)
    targets = config.routing.targets(config.model.num_layers)
    executed = config.model.num_layers - len(targets) + sum(targets)
    assert executed == pytest.approx(load(BASELINE).model.num_layers, rel=1e-6)
    assert config.model.num_layers == load("dense-deep").model.num_layers


@pytest.mark.parametrize("name", [name for name in NAMES if name != BASELINE])
def test_rivals_share_text_and_schedule(name):
    config, baseline = load(name), load(BASELINE)
    assert (config.data, config.optim, config.train) == (baseline.data, baseline.optim, baseline.train)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (BASELINE, "dense-narrow")])
def test_rivals_share_everything_of_the_model_but_depth_and_width_of_the_mlp(name):
    config, baseline = load(name), load(BASELINE)
    shape = {"num_layers": baseline.model.num_layers, "ffn_hidden_size": baseline.model.ffn_hidden_size}
    assert config.model.model_copy(update=shape) == baseline.model


@pytest.mark.parametrize("name", NAMES)
def test_header_says_what_it_is(name):
    head = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0].split("extends")[0]
    assert head.startswith("# ") and len(head.split()) > 12
    assert name == BASELINE or "Compare with" in head or "to compare with" in head


def test_first_order_differs_from_skip_in_that_alone():
    routing = load("skip").routing
    assert routing.benefit == "second_order"
    assert load("skip-first-order").routing == routing.model_copy(update={"benefit": "first_order"})


def test_mixture_of_depths_says_that_its_training_is_not_causal():
    assert "Training is not causal" in (FOLDER / "mod.yaml").read_text()
    assert load("mod").routing.mod.predictor
