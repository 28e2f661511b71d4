"""A run killed by SIGKILL at any moment goes on from a whole checkpoint and is the run that was never killed."""

import signal
from pathlib import Path

import pytest
from ranks import run_ranks
from training import write_config

pytestmark = pytest.mark.survive

WORKER = Path(__file__).parents[1] / "support" / "survival_worker.py"
STEPS = 6
SMALL = [
    f"train.steps={STEPS}",
    "checkpoint.every=1",
    "model.hidden_size=32",
    "model.num_layers=2",
    "metrics.tensorboard=false",
    "metrics.report=false",
    "metrics.trace_samples=0",
]
BOUNDARIES = 60
"""More operations on files than two saves take, the first of a run and one that removes an older checkpoint."""


def survive(folder: Path, corpus: Path, overrides: list[str], before=(), random: int = 0):
    """The starts of a run that was killed at each of these moments in turn."""
    folder.mkdir()
    spec = {
        "config": str(write_config(folder, corpus)),
        "overrides": [*SMALL, *overrides],
        "before": list(before),
        "random": random,
    }
    (starts,) = run_ranks(WORKER, 1, spec, folder / "starts", timeout_s=800, outside_launcher=True)
    return starts


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    (only,) = survive(tmp_path_factory.mktemp("uninterrupted") / "run", corpus, [])
    assert only["code"] == 0 and len(only["losses"]) == STEPS
    return only["losses"]


def assert_survived(starts, uninterrupted) -> None:
    newest = ""
    for each in starts:
        # Never is the last good one gone; a damaged one would have ended the worker.
        assert not newest or each["complete"][-1] >= newest, each
        newest = each["complete"][-1] if each["complete"] else ""
        if each["code"] == 0:
            assert newest == f"step-{STEPS:08d}" and each["losses"] == uninterrupted
            newest = ""  # what comes next is another run
    assert {each["code"] for each in starts} == {0, -signal.SIGKILL} and starts[-1]["code"] == 0


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_killed_between_two_operations_on_files_goes_on(corpus, tmp_path, uninterrupted, asynchronous):
    moments = [5, 12, 30, 41]
    overrides = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=1"]
    starts = survive(tmp_path / "killed", corpus, overrides, moments)
    assert_survived(starts, uninterrupted)
    assert [each["code"] for each in starts] == [-signal.SIGKILL] * len(moments) + [0]
    assert not list((tmp_path / "killed").rglob("*.partial-*")) and not list((tmp_path / "killed").rglob("lease.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_killed_at_every_operation_and_at_thirty_random_moments_goes_on(
    corpus, tmp_path, uninterrupted, asynchronous
):
    overrides = [f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=1"]
    starts = survive(tmp_path / "every", corpus, overrides, range(1, BOUNDARIES + 1))
    assert_survived(starts, uninterrupted)
    reached = [each["complete"] for each in starts[:-1]]
    assert len(reached[0]) == 0 and any("step-00000002" in complete for complete in reached), "no second save was cut"
    starts = survive(tmp_path / "random", corpus, overrides, random=30)
    assert_survived(starts, uninterrupted)
    assert sum(each["code"] != 0 for each in starts) == 30
