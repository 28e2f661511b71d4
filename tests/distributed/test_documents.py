"""Attention within documents in whole runs: every stage and rank knows where documents start."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, numbers

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 6
WITHIN = ["data.attend_across_documents=false"]
TEXT = ["data.sequence_length=64", "routing.init_logit_std=2", "train.validate_every=null"]
TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
RUNS = {
    1: {"one": []},
    2: {
        "tp2-sp": [TP, SP],
        "tp2-sp, recompute": [TP, SP, "train.recompute=full"],
        "pp2": [PP],
        "pp2-interleaved, recompute": [PP, "parallel.virtual_pipeline=2", "train.recompute=selective"],
        "dp2": [],
    },
    # Four stages of one layer: those in the middle read tokens for the sake of their documents alone.
    4: {"pp4": ["parallel.pipeline=4"], "tp2-pp2-sp": [TP, PP, SP]},
}
LAYOUTS = [name for size in RUNS for name in RUNS[size] if name != "one"]


@pytest.fixture(scope="module")
def runs(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[dict]]]:
    """Runs of STEPS steps, one that attends across documents, and one that changes its layout half-way."""
    folder = tmp_path_factory.mktemp("documents")
    ranks = Ranks(tiny_file, folder)

    def run(name: str, overrides: list[str]) -> dict[str, list[str]]:
        return {name: [*TEXT, f"run.directory={folder}/{name.replace(' ', '')}", *overrides]}

    found = ranks.train(1, run("across", []), STEPS)
    for size, layouts in RUNS.items():
        settings = {k: v for name, layout in layouts.items() for k, v in run(name, [*WITHIN, *layout]).items()}
        found |= ranks.train(size, settings, STEPS)
    half = STEPS // 2
    ranks.train(4, run("moved", [*WITHIN, "parallel.pipeline=4"]), half, save=["moved"])
    return found | ranks.train(1, run("moved", WITHIN), half)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(runs, name):
    assert_same_run(name, runs[name], runs["one"])


def test_a_run_of_four_stages_goes_on_in_one_process(runs):
    assert_same_run("moved", runs["moved"], [rank[STEPS // 2 :] for rank in runs["one"]])


def test_documents_matter(runs):
    assert numbers(runs["across"])[-1]["loss"] != pytest.approx(numbers(runs["one"])[-1]["loss"], rel=1e-5)
