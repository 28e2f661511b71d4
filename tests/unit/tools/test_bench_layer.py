"""tools/bench.py layer: what its rows say, not how fast the machine is."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import layer

from megaroute.common.errors import ConfigError
from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device, graphs
from megaroute.platform.device import Platform

SHAPE = ["--hidden", "32", "--heads", "4", "--kv-heads", "2", "--ffn", "48", "--sequence", "64", "--batch", "2"]
CPU = device.resolve("cpu")
KEY_VALUE, QUERY_OUTPUT, MLP, PAIR = 2 * 32 * 2 * 16, 2 * 32 * 2 * 32, 2 * 2 * 32 * 48, 4 * 32
DENSE = KEY_VALUE + QUERY_OUTPUT + MLP + 32.5 * PAIR  # a token sees 32.5 keys in the mean


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    layer.add_arguments(parser)
    return parser.parse_args([*SHAPE, *options])


@pytest.fixture(autouse=True, scope="module")
def _communication(one_process: None) -> None:
    groups.bring_up(ParallelDims(1, 1, 1), seed=1)


@pytest.fixture(scope="module")
def rows(_communication: None) -> list[dict[str, Any]]:
    return layer.measure(parse("--densities", "1,0.5,0.25", "--repeat", "2"), CPU)


def test_one_row_for_each_unit_mode_and_density(rows):
    found = [(row["unit"], row["mode"], row["density"]) for row in rows]
    assert found == [
        (unit, mode, density) for unit in layer.UNITS for mode in layer.MODES for density in (1.0, 0.5, 0.25)
    ]


def test_each_row_computes_its_density(rows):
    for row in rows:
        assert row["rows"] == row["density"] * 128
        if row["mode"] == "exact":
            assert row["executed"] == row["rows"]
        else:  # as many are wanted over all samples, and each sample has its own limit
            assert row["rows"] / 2 < row["executed"] <= row["rows"]


def test_rows_of_a_capacity_are_multiples_of_16():
    (row,) = layer.measure(parse("--densities", "0.3", "--units", "layer", "--modes", "capacity", "--repeat", "1"), CPU)
    assert row["rows"] == 2 * 32  # 0.3 * 64 = 19.2 of each sample


def test_floor_is_that_of_the_formula(rows):
    attention = QUERY_OUTPUT + 32.5 * PAIR
    routed = {"layer": attention + MLP, "attention": attention, "mlp": MLP, "separate": attention + MLP}
    for row in rows:
        assert row["floor"] == pytest.approx(1 - (1 - row["density"]) * routed[row["unit"]] / DENSE)


def test_computed_share_counts_routers_and_masked_pairs(rows):
    for row in rows:
        routers = {"separate": 2}.get(row["unit"], 1)
        if row["unit"] == "mlp":
            assert row["computed"] == pytest.approx(row["floor"] + routers * 2 * 32 / DENSE)
        elif row["density"] == 1:  # plainly causal
            assert row["computed"] == pytest.approx(1 + routers * 2 * 32 / DENSE)


def test_computed_share_of_blocks_is_that_of_the_pairs_of_the_record(rows):
    arguments = parse("--units", "layer", "--modes", "exact")
    config = layer.layer_config(arguments, "layer", "exact")
    routed = layer.build(arguments, config, CPU)[1]
    (variant,) = layer.variants(routed, "layer", "exact", [0.5], CPU)
    pairs = int(variant.records[0].attention_pairs)
    expected = 128 * (KEY_VALUE + 2 * 32) + 64 * (QUERY_OUTPUT + MLP) + pairs * PAIR
    assert layer.computed_share(config.model, variant, 2, 64) == pytest.approx(expected / (128 * DENSE))


def test_every_row_is_timed_beside_a_dense_layer(rows):
    for row in rows:
        assert row["ms"] > 0 and row["dense_ms"] > 0
        assert row["over_floor"] == pytest.approx(row["ratio_to_dense"] / row["floor"])
    assert len({row["dense"] for row in rows}) == 1 and rows[0]["dense"] in ("megatron-core", "megaroute")


def test_ratio_is_the_median_of_neighbouring_turns(monkeypatch):
    arguments = parse("--units", "layer", "--modes", "exact")
    routed = layer.build(arguments, layer.layer_config(arguments, "layer", "exact"), CPU)[1]
    found = layer.variants(routed, "layer", "exact", [0.5], CPU)
    dense = layer.dense_layers(arguments, CPU)["megaroute"]
    slow = iter([1.0] * layer.WARM_UP + [1.0, 10.0, 3.0])  # how busy the machine is, turn by turn
    loads = [load for load in slow for _ in range(2)]
    monkeypatch.setattr(layer, "milliseconds", lambda run, platform: loads.pop(0) * (4.0 if run == routed.run else 5.0))
    (times,) = layer.take_turns(dense, found, 3, CPU)
    assert (times.ms, times.dense_ms, times.ratio) == (12.0, 15.0, 0.8)


def test_both_layers_without_a_router_compute_the_same():
    arguments = parse()
    core, ours = layer.dense_layers(arguments, CPU).values()
    state, width = ours.layer.state_dict(), 8
    k, v = state["self_attention.linear_kv.weight"].view(2, 2 * width, 32).split(width, 1)
    q = state["self_attention.linear_q.weight"].view(2, -1, 32)
    shared = {name: value for name, value in state.items() if name in core.layer.state_dict() and value is not None}
    qkv = {"self_attention.linear_qkv.weight": torch.cat((q, k, v), 1).flatten(0, 1)}
    core.layer.load_state_dict({**shared, **qkv}, strict=False)
    packed = layer.micro_batch(64, layer.RoutingContext())
    outs = [
        each.layer(each.x_SBH, None, rotary_pos_emb=each.angles, packed_seq_params=packed)[0] for each in (core, ours)
    ]
    torch.testing.assert_close(*outs)


def test_half_precision_is_computed_in_it():
    arguments = parse("--precision", "bf16")
    _, routed = layer.build(arguments, layer.layer_config(arguments, "layer", "exact"), CPU)
    routed.run()
    assert routed.x_SBH.dtype == torch.bfloat16
    assert {weight.grad.dtype for weight in routed.layer.parameters()} == {torch.bfloat16}


def test_graphs_are_for_accelerators():
    with pytest.raises(ConfigError, match=r"run\.device"):
        graphs.recorded(lambda: None, Platform(torch.device("cpu"), "gloo"))
