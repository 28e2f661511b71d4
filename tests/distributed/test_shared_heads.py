"""Fewer key-value heads than tensor ranks: ranks that share a head train what one process trains."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, write_config

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 6
ONE_HEAD, TWO_HEADS = "model.num_kv_heads=1", "model.num_kv_heads=2"
TP2, TP4, SP, PP = "parallel.tensor=2", "parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2"
RUNS = {
    1: {"one head": [ONE_HEAD], "two heads": [TWO_HEADS]},
    2: {
        "one head, tp2": [ONE_HEAD, TP2],
        "one head, tp2-sp, recompute": [ONE_HEAD, TP2, SP, "train.recompute=full"],
    },
    4: {
        "two heads, tp4": [TWO_HEADS, TP4],
        "two heads, tp4-sp": [TWO_HEADS, TP4, SP],
        "one head, tp4": [ONE_HEAD, TP4],
        "one head, tp2-pp2": [ONE_HEAD, TP2, PP],
    },
}
LAYOUTS = [name for size in RUNS for name in RUNS[size] if "," in name]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict]]]:
    """Runs of STEPS steps, and one that moves from four tensor ranks to one process half-way."""
    folder = tmp_path_factory.mktemp("heads")
    ranks = Ranks(write_config(folder, corpus), folder)
    found: dict[str, list[list[dict]]] = {}
    for size, layouts in RUNS.items():
        found |= ranks.train(size, layouts, STEPS)
    half = STEPS // 2
    ranks.train(4, {"moved": [TWO_HEADS, TP4]}, half, save=["moved"])
    return found | ranks.train(1, {"moved": [TWO_HEADS]}, half)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(runs, name):
    assert_same_run(name, runs[name], runs[name.split(",")[0]])


def test_checkpoint_of_four_ranks_that_share_two_heads_goes_on_in_one_process(runs):
    assert_same_run("moved", runs["moved"], [rank[STEPS // 2 :] for rank in runs["two heads"]])
