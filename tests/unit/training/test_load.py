"""Where the computed rows lie."""

from dataclasses import replace

import pytest

from megaroute.parallel.dims import ParallelDims
from megaroute.training.load import load_of, max_over_mean
from megaroute.training.reduce import Totals

NOTHING = Totals(
    loss=0.0,
    stop=False,
    tokens=80,
    dense_pairs=(0, 0),
    kept=(),
    rows=(),
    pairs=(),
    needed_pairs=(),
    overflow=(),
    soft=(),
    squared_gap=(),
    choices=(),
    expert_probability=(),
    replica_rows=(),
)


def test_layers_without_a_router_count_in_full(tiny):
    # 4 layers, the first dense; 80 tokens on 2 replicas; stages of 2 layers.
    totals = replace(NOTHING, replica_rows=((10, 30), (20, 20), (40, 0)))
    load = load_of(tiny(), ParallelDims(tensor=2, data=2, pipeline=2), totals)
    assert load.rank_rows == ((50, 70), (60, 20))
    assert load.stages == (60, 40)
    assert load.ranks == pytest.approx(70 / 50)
    assert load.units == pytest.approx((1.5, 1.0, 2.0))


def test_a_branch_is_half_a_layer(tiny):
    dims = ParallelDims(tensor=1, data=1, pipeline=4)
    separate = replace(NOTHING, replica_rows=((10,), (20,), (30,), (40,), (50,), (60,)))
    assert load_of(tiny("routing.unit=separate"), dims, separate).rank_rows == ((80,), (15,), (35,), (55,))
    mlp = replace(NOTHING, replica_rows=((10,), (20,), (30,)))
    assert load_of(tiny("routing.unit=mlp"), dims, mlp).rank_rows == ((80,), (45,), (50,), (55,))


def test_interleaved_stages_hold_several_pieces(tiny):
    totals = replace(NOTHING, replica_rows=((10,), (20,), (30,)))
    dims = ParallelDims(tensor=1, data=1, pipeline=2, virtual_pipeline=2)
    assert load_of(tiny(), dims, totals).rank_rows == ((80 + 20,), (10 + 30,))


def test_a_model_without_routers_is_even(tiny):
    load = load_of(tiny("routing.router=dense"), ParallelDims(tensor=1, data=2, pipeline=2), NOTHING)
    assert load.ranks == 1.0 and load.units == ()


def test_nothing_computed_is_even():
    assert max_over_mean([0, 0]) == 1.0
    assert max_over_mean([3, 1]) == 1.5
