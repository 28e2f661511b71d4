"""Best-fit packing in whole runs: padding and the mean over real targets are the same in every layout."""

from pathlib import Path

import pytest
from training import Ranks, assert_same_run, numbers

pytestmark = [pytest.mark.parity, pytest.mark.data]

STEPS = 4
TEXT = [
    *("data.packing=best_fit", "data.packing_window=2", "data.attend_across_documents=false"),
    *("data.sequence_length=192", "routing.init_logit_std=2", "train.validate_every=null"),
]
TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
RUNS = {
    1: {"one": [], "micro-batches of 4": ["train.micro_batch=4"]},
    2: {"tp2-sp": [TP, SP], "pp2, recompute": [PP, "train.recompute=full"], "dp2": []},
}
SLOW = {4: {"pp4": ["parallel.pipeline=4"], "tp2-pp2-sp": [TP, PP, SP], "tp2-dp2": [TP]}}


class Runs(dict[str, list[list[dict]]]):
    """Runs of STEPS steps, by name."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.ranks, self.folder = Ranks(config, folder), folder

    def train(self, layouts: dict[int, dict[str, list[str]]]) -> None:
        for size, overrides in layouts.items():
            settings = {
                name: [*TEXT, f"run.directory={self.folder}/{name.replace(' ', '')}", *layout]
                for name, layout in overrides.items()
            }
            self.update(self.ranks.train(size, settings, STEPS))


@pytest.fixture(scope="module")
def runs(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tiny_file, tmp_path_factory.mktemp("packing"))
    found.train(RUNS)
    return found


def test_rows_end_in_padding(runs):
    for step in numbers(runs["one"]):
        totals = step["totals"]
        assert totals["tokens"] + totals["padding"] == 8 * 192 and totals["padding"] > 50
        assert step["density"] == [kept / totals["tokens"] for kept in totals["kept"]]


@pytest.mark.parametrize("name", [name for size in RUNS for name in RUNS[size] if name != "one"])
def test_layout_changes_nothing(runs, name):
    assert_same_run(name, runs[name], runs["one"])
    for a, b in zip(numbers(runs[name]), numbers(runs["one"]), strict=True):
        assert (a["digest"], a["totals"]["tokens"]) == (b["digest"], b["totals"]["tokens"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nor_do_four_ranks(runs):
    runs.train(SLOW)
    for name in SLOW[4]:
        assert_same_run(name, runs[name], runs["one"])
