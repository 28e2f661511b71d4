"""What the `routing` section refuses: one sentence that names the dotted key, and nothing that could be meant."""

import pytest

from megaroute.common.errors import ConfigError
from megaroute.config.checks import check_config
from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit

CAPACITY = "routing.dispatch.mode=capacity"
EXCHANGE = "routing.dispatch.exchange=dp"

VALUES = {
    # override: words of the message
    "routing.density=0": "routing.density is 0 (on the command line), must be greater than 0",
    "routing.density=-0.5": "routing.density is -0.5 (on the command line), must be greater than 0",
    "routing.density=1.5": "routing.density is 1.5 (on the command line), must be less than or equal to 1",
    "routing.density=half": "routing.density is 'half' (on the command line), must be a number",
    "routing.densities=[0.5, 2]": "routing.densities.1 is 2 (on the command line), must be less than or equal to 1",
    "routing.unit=block": "routing.unit is 'block' (on the command line), must be 'layer', 'attention', 'mlp' or",
    "routing.router=mixture": "routing.router is 'mixture' (on the command line), must be 'gumbel', 'dense', 'random',",
    "routing.estimator=reinforce": "routing.estimator is 'reinforce' (on the command line), must be 'st_gumbel' or",
    "routing.force=keep_some": "routing.force is 'keep_some' (on the command line), must be 'keep_all', 'keep_none' or",
    "routing.layers=[-1]": "routing.layers.0 is -1 (on the command line), must be greater than or equal to 0",
    "routing.every=0": "routing.every is 0 (on the command line), must be greater than 0",
    "routing.temperature=0": "routing.temperature is 0 (on the command line), must be greater than 0",
    "routing.noise=-1": "routing.noise is -1 (on the command line), must be greater than or equal to 0",
    "routing.density_anneal={start: 1}": "routing.density_anneal.steps is missing",
    "routing.density_anneal={start: 1, steps: 0}": "routing.density_anneal.steps is 0 (on the command line), must be",
    "routing.budget.weight=-1": "routing.budget.weight is -1 (on the command line), must be greater than or equal to 0",
    "routing.budget.estimator=rank": "routing.budget.estimator is 'rank' (on the command line), must be 'global' or",
    "routing.controller.gain=-1": "routing.controller.gain is -1 (on the command line), must be greater than or equal",
    "routing.dispatch.mode=dense": "routing.dispatch.mode is 'dense' (on the command line), must be 'exact', ",
    "routing.dispatch.exchange=tp": "routing.dispatch.exchange is 'tp' (on the command line), must be 'none' or 'dp'",
    "routing.capacity.factor=0": "routing.capacity.factor is 0 (on the command line), must be greater than 0",
    "routing.capacity.scope=rank": "routing.capacity.scope is 'rank' (on the command line), must be 'unit' or 'stage'",
    "routing.moe.top_k=3": "routing.moe.top_k is 3 (on the command line), must be 1 or 2",
    "routing.moe.experts=0": "routing.moe.experts is 0 (on the command line), must be greater than or equal to 1",
    "routing.alarm.low=1": "routing.alarm.low is 1 (on the command line), must be less than 1",
    "routing.keep=0.5": "routing.keep (on the command line) is not a configuration key; did you mean ",
}


@pytest.mark.parametrize("override, words", VALUES.items(), ids=VALUES)
def test_impossible_value_is_refused_by_its_key(small, override, words):
    with pytest.raises(ConfigError) as refused:
        small(override)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


CONTRADICTIONS = {
    # words of the message: overrides
    "routing.layers has 8, but model.num_layers 8 counts layers 0 to 7": ["routing.layers=[0, 8, 9]"],
    "(routing.layers is empty)": ["routing.layers=[]"],
    "(routing.first_dense 4 + routing.last_dense 4 >= model.num_layers 8)": [
        *("routing.first_dense=4", "routing.last_dense=4"),
    ],
    "routing.densities has 3 targets for 8 routed layers": ["routing.densities=[0.1, 0.2, 0.3]"],
    "routing.densities has 2 targets for 4 routed layers": ["routing.densities=[1, 0.5]", "routing.every=2"],
    "routing.density_anneal.start 2 > 1": ["routing.density_anneal={start: 2, steps: 5}"],
    "routing.densities has 0.7 above 0.3": [
        *("routing.router=early_exit", "routing.layers=[1, 2, 5]", "routing.densities=[0.5, 0.3, 0.7]"),
    ],
    "routing.alarm.low 0.5 >= routing.alarm.high 0.4": ["routing.alarm={low: 0.5, high: 0.4}"],
    "routing.mod.predictor=true, or routing.causal_evaluation=false": [
        *("routing.router=mod", "routing.mod.predictor=false"),
    ],
    "routing.router early_exit with parallel.pipeline 2": ["routing.router=early_exit", "parallel.pipeline=2"],
    "routing.router early_exit stops tokens at layers, not at unit mlp": [
        *("routing.router=early_exit", "routing.unit=mlp"),
    ],
    "routing.router moe replaces the MLP, not unit layer": ["routing.router=moe"],
    "routing.moe.top_k 2 > routing.moe.experts 1": [
        *("routing.router=moe", "routing.unit=mlp", "routing.moe={top_k: 2, experts: 1}"),
    ],
    "routing.router moe with data.packing best_fit: padding would be given to experts": [
        *("routing.router=moe", "routing.unit=mlp", "data.packing=best_fit"),
    ],
    "routing.force keep_none overrules decisions to skip, but with routing.router moe": [
        *("routing.router=moe", "routing.unit=mlp", "routing.force=keep_none"),
    ],
    "routing.controller.trend 0.5 >= routing.controller.gain 0.5": ["routing.controller={gain: 0.5, trend: 0.5}"],
    "routing.controller.gain 0.1 has nothing to correct in routing.router random": [
        *("routing.router=random", "routing.controller.gain=0.1"),
    ],
    "routing.gradient all is a straight-through gradient, which routing.router highway has not": [
        *("routing.gradient=all", "routing.router=highway", "routing.dispatch.mode=masked"),
    ],
    "but routing.dispatch.mode exact does not compute it": ["routing.gradient=all"],
    "routing.gradient all is defined for routing.gate straight_through, not probability": [
        *("routing.gradient=all", "routing.dispatch.mode=masked", "routing.gate=probability"),
    ],
    "routing.dispatch.mode capacity does not fit routing.router highway": [CAPACITY, "routing.router=highway"],
    "routing.dispatch.mode capacity does not fit routing.router moe": [
        *(CAPACITY, "routing.router=moe", "routing.unit=mlp"),
    ],
    "routing.capacity.factor 0.9 < 1 with routing.capacity.scope stage": [
        "routing.capacity={factor: 0.9, scope: stage}"
    ],
    "routing.layers has 3 more than once": ["routing.layers=[3, 1, 3]"],
    "model.ffn_hidden_size 101 % routing.moe.top_k 2 = 1": [
        *("routing.router=moe", "routing.unit=mlp", "routing.moe.top_k=2", "model.ffn_hidden_size=101"),
    ],
    "routing.moe.ffn_hidden_size 97 % parallel.tensor 2 = 1": [
        *("routing.router=moe", "routing.unit=mlp", "routing.moe.ffn_hidden_size=97", "parallel.tensor=2"),
    ],
    "routing.benefit second_order corrects the straight-through gradient, which routing.router mod": [
        *("routing.router=mod", "routing.benefit=second_order"),
    ],
    "which routing.router gumbel with routing.gate probability has not": [
        *("routing.gate=probability", "routing.benefit=second_order"),
    ],
    "routing.benefit second_order is that of executed tokens": [
        *("routing.gradient=all", "routing.dispatch.mode=masked", "routing.benefit=second_order"),
    ],
    "routing.dispatch.exchange dp moves rows of binary-routed MLP units, but routing.router gumbel has unit layer": [
        *(EXCHANGE, "parallel.data=2"),
    ],
    "but routing.router dense has unit mlp": [EXCHANGE, "parallel.data=2", "routing.router=dense", "routing.unit=mlp"],
    "but routing.router moe has unit mlp": [EXCHANGE, "parallel.data=2", "routing.router=moe", "routing.unit=mlp"],
    "moves the rows of dispatch mode exact, not those of mode capacity": [
        *(EXCHANGE, "parallel.data=2", "routing.unit=mlp", CAPACITY),
    ],
    "routing.dispatch.exchange dp needs at least two replicas to exchange rows, and parallel.data is 1": [
        *(EXCHANGE, "parallel.data=1", "routing.unit=mlp"),
    ],
}


@pytest.mark.parametrize("words, overrides", CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_contradiction_is_refused_with_its_numbers_and_a_way_out(small, words, overrides):
    with pytest.raises(ConfigError) as refused:
        check_config(small(*overrides))
    sentence = str(refused.value)
    assert words in sentence
    assert "\n" not in sentence and "more)" not in sentence
    assert ";" in sentence, "a sentence that does not say what to do"


@pytest.mark.parametrize(
    "overrides",
    [
        ["routing.density=1"],
        ["routing.layers=[7, 0, 3]", "routing.densities=[0.9, 0.5, 0.9]"],
        ["routing.router=early_exit", "routing.layers=[1, 2, 5]", "routing.densities=[0.5, 0.5, 0.3]"],
        ["routing.router=mod", "routing.mod.predictor=false", "routing.causal_evaluation=false"],
        ["routing.router=mod", "parallel.pipeline=2"],
        ["routing.router=moe", "routing.unit=mlp", "routing.moe={top_k: 2, experts: 2}"],
        ["routing.gradient=all", "routing.dispatch.mode=masked"],
        ["routing.density_anneal={start: 1, steps: 5, after: 2}", CAPACITY],
        [CAPACITY, "routing.capacity={factor: 0.9, scope: unit}"],
        [CAPACITY, "routing.capacity={factor: 1.0, scope: stage}"],
        [EXCHANGE, "parallel.data=2", "routing.unit=separate"],
        [EXCHANGE, "routing.unit=mlp"],  # the number of replicas is not known yet
        ["routing.router=dense", "routing.gradient=all"],  # nothing of it is read
    ],
    ids=str,
)
def test_what_fits_is_accepted(small, overrides):
    check_config(small(*overrides))


def test_exchange_is_refused_as_soon_as_one_process_is_known_to_be_all(small):
    config = small(EXCHANGE, "routing.unit=mlp")
    with pytest.raises(ConfigError, match="routing.dispatch.exchange dp needs at least two replicas"):
        check_config(config, world_size=1)
    check_config(config, world_size=2)


@pytest.mark.parametrize(
    "overrides, layers",
    [
        ([], range(8)),
        (["routing.first_dense=2"], range(2, 8)),
        (["routing.last_dense=3"], range(5)),
        (["routing.every=2"], [0, 2, 4, 6]),
        (["routing.first_dense=1", "routing.every=3", "routing.last_dense=1"], [1, 4]),
        (["routing.layers=[6, 1, 6]", "routing.first_dense=4"], [1, 6]),
        (["routing.router=dense"], []),
    ],
    ids=str,
)
def test_pattern_says_which_layers_are_routed(small, overrides, layers):
    assert small(*overrides).routed_layers == tuple(layers)


def test_units_come_in_the_order_in_which_a_token_meets_them_and_have_numbers_of_their_own():
    routing = RoutingConfig(unit="separate", layers=(1, 4), densities=(0.9, 0.4))
    units = routing.units(8)
    assert units == (Unit(1, "attention"), Unit(1, "mlp"), Unit(4, "attention"), Unit(4, "mlp"))
    assert [unit.label for unit in units] == ["1 attention", "1 mlp", "4 attention", "4 mlp"]
    assert [unit.key for unit in units] == [2, 3, 8, 9]
    assert routing.targets(8) == (0.9, 0.9, 0.4, 0.4)
    # A layer's number does not depend on what else is routed, so neither does its noise.
    assert [unit.key for unit in RoutingConfig(first_dense=3).units(6)] == [6, 8, 10]


def test_schedules_start_elsewhere_and_arrive_on_a_straight_line():
    routing = RoutingConfig.model_validate(
        {
            "density": 0.2,
            "density_anneal": {"start": 1.0, "steps": 4, "after": 2},
            "temperature": 0.5,
            "temperature_anneal": {"start": 2.5, "steps": 4},
            "noise": 0.0,
            "noise_anneal": {"start": 1.0, "steps": 2, "after": 1},
        }
    )
    steps = (0, 1, 2, 3, 4, 5, 6, 7, 1000)
    targets = [routing.targets(1, step)[0] for step in steps]
    assert targets == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    temperatures = [routing.temperature_at(step) for step in steps]
    assert temperatures == pytest.approx([2.5, 2, 1.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert [routing.noise_at(step) for step in steps] == pytest.approx([1, 1, 0.5, 0, 0, 0, 0, 0, 0])
    assert routing.targets(1) == (0.2,)
    assert RoutingConfig(density=0.3).targets(1, 5) == (0.3,)
