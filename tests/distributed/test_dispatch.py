"""Capacity and exchange in whole runs: neither micro-batches, layouts nor moved rows change what is learned."""

from pathlib import Path

import pytest
from training import Ranks, decisions, numbers, write_config

# Three starts of ranks, each with several runs, are slow on two busy cores; a hang still ends here.
pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

STEPS = 4
MLP = ["routing.unit=mlp"]
EXCHANGE = [*MLP, "routing.dispatch.exchange=dp"]
CAPACITY = ["routing.dispatch.mode=capacity", "routing.capacity.factor=0.8"]
POOLED = ["routing.unit=separate", "routing.dispatch.mode=capacity", "routing.capacity={factor: 1.0, scope: stage}"]
CAPACITY_ROWS = 32
"""0.8 * 0.5 * 64 tokens, rounded up to a multiple of 16."""
RUNS = {
    1: {
        "mlp": MLP,
        "capacity": CAPACITY,
        "capacity, micro-batch 4": [*CAPACITY, "train.micro_batch=4"],
        "pooled": POOLED,
        "pooled, micro-batch 4": [*POOLED, "train.micro_batch=4"],
    },
    2: {
        "mlp, exchange": EXCHANGE,
        "mlp, exchange and recompute": [*EXCHANGE, "train.recompute=full"],
        "mlp, exchange and selective recompute": [*EXCHANGE, "train.recompute=selective"],
        "capacity, dp2": CAPACITY,
        "capacity, tp2": [*CAPACITY, "parallel.tensor=2"],
        "pooled, dp2 and recompute": [*POOLED, "train.recompute=full"],
        "pooled, tp2": [*POOLED, "parallel.tensor=2"],
        "capacity, pp2 and recompute": [*CAPACITY, "parallel.pipeline=2", "train.recompute=full"],
    },
    4: {
        "mlp, exchange, tp2-sp": [*EXCHANGE, "parallel.tensor=2", "parallel.sequence=true"],
        "mlp, exchange, pp2": [*EXCHANGE, "parallel.pipeline=2"],
    },
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict]]]:
    folder = tmp_path_factory.mktemp("dispatch")
    ranks = Ranks(write_config(folder, corpus), folder)
    found = {}
    for world_size, settings in RUNS.items():
        found |= ranks.train(world_size, settings, STEPS)
    return found


VARIANTS = [name for world_size in RUNS for name in RUNS[world_size] if name not in ("mlp", "capacity", "pooled")]


@pytest.mark.parametrize("name", VARIANTS)
def test_run_is_that_of_one_process(runs, name):
    ranks, reference = runs[name], runs[name.split(",")[0]]
    for step, expected in zip(numbers(ranks), numbers(reference), strict=True):
        for key in ("loss", "budget_loss"):
            assert step[key] == pytest.approx(expected[key], rel=1e-6), f"step {expected['step']}: {key}"
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert decisions(ranks) == decisions(reference)


def padding(ranks: list[list[dict]]) -> list[int]:
    """Rows computed beyond the kept tokens, over all ranks, of every unit in every step."""
    found = []
    for step, made in zip(numbers(ranks), decisions(ranks), strict=True):
        units = sorted({unit for unit, _ in made})
        kept = [sum(len(positions) for (unit, _), positions in made.items() if unit == each) for each in units]
        found += [rows - tokens for rows, tokens in zip(step["rows"], kept, strict=True)]
    return found


@pytest.mark.parametrize("name", ["mlp, exchange", "mlp, exchange and recompute", "mlp, exchange, pp2"])
def test_exchanged_ranks_compute_the_mean_rounded_up(runs, name):
    # Two replicas with two micro-batches a step: a row of padding where both together keep an odd number.
    assert set(padding(runs[name])) == {0, 1, 2}
    assert set(padding(runs["mlp"])) == {0}


def test_pooled_units_overflow(runs):
    assert any(sum(step["totals"]["overflow"]) for step in numbers(runs["pooled"]))


def test_capacity_is_met_and_not_exceeded(runs):
    kept = [len(positions) for step in decisions(runs["capacity"]) for positions in step.values()]
    assert max(kept) == CAPACITY_ROWS
    assert min(kept) < CAPACITY_ROWS
    for step in numbers(runs["capacity"]):
        assert step["rows"] == [8 * CAPACITY_ROWS] * 3
