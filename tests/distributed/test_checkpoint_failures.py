"""Saving that fails on one rank ends all of them with its sentence; a second start of a living run is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import REPOSITORY, run_ranks
from training import Ranks, numbers, write_config

from megaroute.checkpoint.layout import complete_checkpoints, leftovers

pytestmark = [pytest.mark.survive, pytest.mark.data]

WORKER = Path(__file__).parents[1] / "support" / "save_worker.py"


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param({"rank": 1, "at": "write", "wait": False}, id="write beside training"),
        pytest.param({"rank": 0, "at": "write", "wait": True}, marks=pytest.mark.slow, id="write"),
        pytest.param({"rank": 1, "at": "stage", "wait": False}, marks=pytest.mark.slow, id="copy"),
    ],
)
def test_a_write_that_fails_on_one_rank_ends_all_with_its_sentence(corpus, tmp_path, failing):
    spec = {"config": str(write_config(tmp_path, corpus)), "overrides": ["checkpoint.keep=1"], **failing}
    ends = run_ranks(WORKER, 2, spec, tmp_path / "ranks", timeout_s=200)
    assert ends[0] == ends[1] and ends[0]["saved"] == 1
    assert f"step 2 could not be written (rank {failing['rank']} on " in ends[0]["ended"]
    assert "No space left on device" in ends[0]["ended"] and "\n" not in ends[0]["ended"]
    root = tmp_path / "run" / "checkpoints"
    assert [path.name for path in complete_checkpoints(root)] == ["step-00000001"] and leftovers(root) == []


def pretrain(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megaroute.cli", "pretrain", str(config), "optim.warmup_steps=0", *overrides]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_second_start_of_a_living_run_is_refused_and_a_killed_one_is_not_in_the_way(corpus, tmp_path):
    config, lease = write_config(tmp_path, corpus), tmp_path / "run" / "checkpoints" / "lease.json"
    first = pretrain(config, "train.steps=100000", "checkpoint.every=1")
    try:
        deadline = time.monotonic() + 200
        while not complete_checkpoints(lease.parent):
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = pretrain(config, "train.steps=3")
        output, _ = second.communicate(timeout=200)
        assert second.returncode == 2, output
        assert f"is in use by process {first.pid} on " in output
        assert json.loads(lease.read_text())["pid"] == first.pid and first.poll() is None
    finally:
        first.kill()
        first.communicate()
    reached = int(complete_checkpoints(lease.parent)[-1].name.removeprefix("step-"))
    third = pretrain(config, f"train.steps={reached + 1}")
    output, _ = third.communicate(timeout=200)
    assert third.returncode == 0, output
    assert "taking over from process" in output and not lease.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_goes_on_under_interleaved_stages_and_more_replicas(corpus, tmp_path):
    """Written by two replicas beside training: their slices of the optimizer's state cut weights anywhere."""
    ranks = Ranks(write_config(tmp_path, corpus), tmp_path)
    halves = {"first": ["parallel.tensor=2", "parallel.sequence=true"]}
    ranks.train(4, halves, 3, save=["first"])
    whole = ranks.train(1, {"whole": [f"run.directory={tmp_path}/whole"]}, 6)["whole"]
    for name, world_size, layout in (
        ("interleaved", 2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        ("replicas", 4, []),
    ):
        resumed = ranks.train(world_size, {name: layout}, 3)[name]
        for a, b in zip(numbers(resumed), numbers(whole)[3:], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), name
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5), name
