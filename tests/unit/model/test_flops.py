"""Counted FLOPs against torch's own counter on the running model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaroute.config.load import load_config
from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.model.flops import (
    EXECUTED_PARTS,
    TRAINING_FACTOR,
    UnitWork,
    causal_pairs,
    dense_forward,
    executed_forward,
    forward_cost,
    overflow_forward,
    training_flops,
)
from megaroute.model.microbatch import micro_batch
from megaroute.routing.context import RoutingContext

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm}
"""Every product outside of attention, whose kernels the counter sees or not, depending on the device."""
ROWS, LENGTH = 3, 64


@pytest.fixture
def run(build, tiny):
    """`run(overrides, backward)`: (configuration, FLOPs of matrix products as torch sees them, records)."""

    def run(overrides, backward=False):
        config = tiny(f"data.sequence_length={LENGTH}", *overrides)
        model = build(config)
        context = RoutingContext(seed=1, step=0, samples_B=torch.arange(ROWS))
        tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300
        with FlopCounterMode(display=False) as counter:
            losses = model(tokens, None, None, labels=tokens, packed_seq_params=micro_batch(LENGTH, context))
            if backward:
                losses.mean().backward()
        counts = counter.get_flop_counts()["Global"]
        return config, sum(counts.get(product, 0) for product in PRODUCTS), context.records

    return run


def work_of(config, records) -> list[UnitWork]:
    """What the records say, added up by a loop over tokens."""
    work = []
    for unit in config.units:
        record = records[unit.key]
        needed = sum(position + 1 for position, _ in record.keep_SB.nonzero().tolist())
        pairs = int(record.attention_pairs)
        overflow = 0 if record.overflow is None else int(record.overflow)
        work.append(UnitWork(unit, int(record.keep_SB.sum()), record.rows, pairs, min(needed, pairs), overflow))
    return work


def without_attention(config, work, factor=1) -> int:
    """Our count of everything but query-key pairs."""
    executed = sum(executed_forward(config.model, config.routing, ROWS, LENGTH, work).values())
    dense = config.model.num_layers - sum(each.unit.part != "mlp" for each in work)
    pairs = dense * causal_pairs(ROWS, LENGTH) + sum(each.pairs for each in work)
    return factor * (executed - pairs * forward_cost(config.model).attention_pair)


CAPACITY = "routing.dispatch.mode=capacity"
RUNS = [
    [],
    ["model.num_kv_heads=4", "model.activation=gelu", "model.head_dim=6"],
    ["routing.first_dense=0", "routing.force=keep_none", "model.tie_embeddings=true"],
    ["routing.force=fixed_ratio", "routing.density=0.2", "routing.every=2"],
    ["routing.dispatch.mode=masked"],
    ["routing.unit=attention"],
    ["routing.unit=mlp"],
    ["routing.unit=separate"],
    ["routing.unit=separate", "routing.dispatch.mode=masked"],
    [CAPACITY, "routing.capacity.factor=0.7"],
    [CAPACITY, "routing.capacity.factor=4", "routing.unit=separate"],
    [CAPACITY, "routing.capacity.scope=stage"],
    ["routing.router=random"],
    ["routing.router=highway"],
    ["routing.router=mod"],
    ["routing.router=mod", "routing.mod.predictor=false"],
    ["routing.router=early_exit"],
    ["routing.router=random_ltd", "routing.unit=attention"],
    ["routing.router=moe", "routing.unit=mlp"],
    ["routing.router=moe", "routing.unit=mlp", "routing.moe.top_k=2", "routing.moe.capacity_factor=0.5"],
    ["routing.router=dense"],
]


@pytest.mark.parametrize("overrides", RUNS, ids=str)
def test_matrix_products_are_counted_exactly(run, overrides):
    config, products, records = run(overrides)
    assert products == without_attention(config, work_of(config, records))


@pytest.mark.parametrize("overrides", [RUNS[0], RUNS[1], RUNS[7], RUNS[12], RUNS[18]], ids=str)
def test_backward_pass_costs_twice_the_forward_pass(run, overrides):
    config, products, records = run(overrides, backward=True)
    work = work_of(config, records)
    routers = executed_forward(config.model, config.routing, ROWS, LENGTH, work)["router"]
    expected = without_attention(config, work, TRAINING_FACTOR)
    # A router's gradient is of rank one, and torch may write it without a product that its counter sees.
    assert expected - (TRAINING_FACTOR - 1) * routers <= products <= expected


@pytest.mark.parametrize("overrides", RUNS, ids=str)
def test_parts_say_what_was_kept_and_what_was_thrown_away(run, overrides):
    config, _, records = run(overrides)
    work, cost = work_of(config, records), forward_cost(config.model, config.routing)
    parts = executed_forward(config.model, config.routing, ROWS, LENGTH, work)
    tokens, layers = ROWS * LENGTH, config.model.num_layers
    assert tuple(parts) == EXECUTED_PARTS
    assert parts["head"] == tokens * cost.head_row
    assert parts["key_value"] == layers * tokens * cost.key_value_row
    kept = {unit.key: int(records[unit.key].keep_SB.sum()) for unit in config.units}
    attention = [(kept[u.key] if u in config.units else tokens) for u in branches(config, "attention")]
    assert parts["query_output"] == sum(attention) * cost.query_output_row
    if config.routing.router != "moe":
        mlp = [(kept[u.key] if u in config.units else tokens) for u in branches(config, "mlp")]
        assert parts["mlp"] == sum(mlp) * cost.mlp_row
    assert parts["padding"] >= 0 and (parts["padding"] == 0) == all(
        (each.rows == each.kept or config.routing.router == "moe") and each.pairs == each.needed_pairs for each in work
    )


def branches(config, part) -> list[Unit]:
    """The unit that decides on this branch in each layer; one that is not in config.units where there is none."""
    return [
        Unit(layer, "layer") if Unit(layer, "layer") in config.units else Unit(layer, part)
        for layer in range(config.model.num_layers)
    ]


def test_without_routers_the_parts_are_the_dense_model(tiny_file):
    config = load_config(tiny_file, ["routing.router=dense"])
    parts = executed_forward(config.model, config.routing, ROWS, LENGTH, [])
    assert sum(parts.values()) == dense_forward(config.model, ROWS, LENGTH)
    assert parts["router"] == parts["padding"] == 0


def test_keeping_everything_costs_the_dense_model_and_the_router(run):
    config, _, records = run(["routing.force=keep_all"])
    parts = executed_forward(config.model, config.routing, ROWS, LENGTH, work_of(config, records))
    assert sum(parts.values()) - parts["router"] == dense_forward(config.model, ROWS, LENGTH)
    assert parts["router"] == 3 * ROWS * LENGTH * 2 * config.model.hidden_size


def test_fewer_rows_cost_less_by_what_a_row_executes(tiny_file):
    model, routing = load_config(tiny_file).model, RoutingConfig()
    less, more = (
        executed_forward(model, routing, 1, 64, [UnitWork(Unit(1, "layer"), 9, rows, 100, 90)]) for rows in (20, 21)
    )
    assert sum(more.values()) - sum(less.values()) == forward_cost(model).executed_row
    assert more["padding"] - less["padding"] == forward_cost(model).executed_row


@pytest.mark.parametrize("part, rows", [("layer", ("query_output_row", "mlp_row")), ("mlp", ("mlp_row",))])
def test_overflow_is_told_and_not_executed(tiny_file, part, rows):
    model, routing = load_config(tiny_file).model, RoutingConfig()
    cost = forward_cost(model)
    dropped = UnitWork(Unit(2, part), 10, 10, 0, 0, overflow=4)
    pairs = 0 if part == "mlp" else 4 * 65 // 2
    expected = 4 * sum(getattr(cost, row) for row in rows) + pairs * cost.attention_pair
    assert overflow_forward(model, routing, 64, [dropped]) == expected
    flops = training_flops(model, routing, 1, 64, [dropped])
    none = training_flops(model, routing, 1, 64, [UnitWork(Unit(2, part), 10, 10, 0, 0)])
    assert flops.overflow == TRAINING_FACTOR * expected
    assert flops.executed == none.executed and none.overflow == 0
    assert flops.dense == TRAINING_FACTOR * dense_forward(model, 1, 64)
