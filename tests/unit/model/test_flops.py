"""Counted FLOPs against torch's own counter on the running model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megaroute.config.load import load_config
from megaroute.model.flops import TRAINING_FACTOR, dense_forward, executed_forward, forward_cost
from megaroute.model.microbatch import micro_batch
from megaroute.routing.context import RoutingContext

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ROWS, LENGTH = 3, 64


def attention_flops(query_shape, key_shape, value_shape, *_, **__) -> int:
    """As torch counts it for other devices; its formula wants as many key heads as query heads."""
    batch, heads = query_shape[:2]
    return sdpa_flop_count(query_shape, (batch, heads, *key_shape[2:]), (batch, heads, *value_shape[2:]))


@pytest.fixture
def run(build, tiny):
    """`run(overrides, backward)`: (configuration, FLOPs of matrix products and of attention as torch sees them, what
    routing recorded)."""

    def run(overrides, backward=False):
        config = tiny(f"data.sequence_length={LENGTH}", *overrides)
        model = build(config)
        context = RoutingContext(seed=1, step=0, samples_B=torch.arange(ROWS))
        tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300
        with FlopCounterMode(display=False, custom_mapping={ATTENTION: attention_flops}) as counter:
            losses = model(tokens, None, None, labels=tokens, packed_seq_params=micro_batch(LENGTH, context))
            if backward:
                losses.mean().backward()
        counts = dict(counter.get_flop_counts()["Global"])
        attention = counts.pop(ATTENTION, 0)
        return config, sum(counts.values()), attention, context.records

    return run


def expected(config, records) -> tuple[int, int]:
    """(all, attention's part) of the forward pass by our count."""
    rows = [records[unit].rows for unit in config.routed_layers]
    pairs = [records[unit].attention_pairs for unit in config.routed_layers]
    dense = config.model.num_layers - len(rows)
    causal = dense * ROWS * LENGTH * (LENGTH + 1) // 2
    attention = (causal + sum(pairs)) * forward_cost(config.model).attention_pair
    return executed_forward(config.model, ROWS, LENGTH, rows, pairs), attention


SHAPES = [
    [],
    ["model.num_kv_heads=4", "model.activation=gelu", "model.head_dim=6"],
    ["routing.first_dense=0", "routing.force=keep_none", "model.tie_embeddings=true"],
    ["routing.force=fixed_ratio", "routing.density=0.2", "routing.every=2"],
    ["routing.dispatch.mode=masked"],
]


@pytest.mark.parametrize("overrides", SHAPES, ids=str)
def test_matrix_products_are_counted_exactly(run, overrides):
    config, products, _, records = run(overrides)
    everything, attention = expected(config, records)
    assert products == everything - attention


@pytest.mark.parametrize("overrides", SHAPES, ids=str)
def test_attention_is_counted_by_pairs(run, overrides):
    # torch counts a causal call as if it touched all S * S pairs; where queries were chosen, the calls themselves are
    # cut to the keys in sight, so that both counts mean the same.
    config, _, seen, records = run(overrides)
    pairs = 0
    for layer in range(config.model.num_layers):
        plainly_causal = layer not in records or records[layer].rows == ROWS * LENGTH
        pairs += ROWS * LENGTH * LENGTH if plainly_causal else records[layer].attention_pairs
    assert seen == pairs * forward_cost(config.model).attention_pair


@pytest.mark.parametrize("overrides", SHAPES[:2], ids=str)
def test_backward_pass_costs_twice_the_forward_pass(run, overrides):
    config, products, _, records = run(overrides, backward=True)
    everything, attention = expected(config, records)
    assert products == TRAINING_FACTOR * (everything - attention)


def test_dense_forward_is_the_model_without_routers(run):
    config, products, attention, _ = run(["routing.router=dense"])
    dense = dense_forward(config.model, ROWS, LENGTH)
    causal = config.model.num_layers * ROWS * LENGTH * (LENGTH + 1) // 2 * forward_cost(config.model).attention_pair
    assert products == dense - causal
    assert dense == executed_forward(config.model, ROWS, LENGTH, [], [])
    assert attention * (LENGTH + 1) == 2 * LENGTH * causal


def test_fewer_rows_cost_less_by_what_a_row_executes(tiny_file):
    model = load_config(tiny_file).model
    less, more = (executed_forward(model, 1, 64, [rows, 10], [100, 100]) for rows in (20, 21))
    assert more - less == forward_cost(model).executed_row
