"""Biases of queries, keys and values, and norms of heads: every layout trains what one process trains."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, write_config

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 6
BOTH = ["model.qkv_bias=true", "model.qk_norm=true"]
TP2, SP, PP = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"
RUNS = {
    1: {"both": BOTH},
    4: {
        "both, tp2-pp2": [*BOTH, TP2, PP],
        "both, tp2-pp2-sp": [*BOTH, TP2, PP, SP],
        "both, tp4": [*BOTH, "parallel.tensor=4"],  # two key-value heads, each shared by two ranks
    },
}
LAYOUTS = [name for size in RUNS for name in RUNS[size] if "," in name]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict]]]:
    folder = tmp_path_factory.mktemp("heads")
    ranks = Ranks(write_config(folder, corpus), folder)
    found: dict[str, list[list[dict]]] = {}
    for size, layouts in RUNS.items():
        found |= ranks.train(size, layouts, STEPS)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(runs, name):
    assert_same_run(name, runs[name], runs["both"])
