"""Ctrl-C of a real launch: every rank ends within 10 s, nobody is left behind, and the run goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import REPOSITORY
from training import write_config

from megaroute.checkpoint.layout import complete_checkpoints, read_run
from megaroute.common.exit_codes import HUNG
from megaroute.metrics.history import read_history

# Four processes that import torch take minutes to start on two busy cores; a hang still ends here.
pytestmark = pytest.mark.timeout(600)

LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2"]


def launch(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megaroute.cli", "launch", str(config), *LAYOUT, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MEGAROUTE_TEST": str(config)}
    return subprocess.Popen(
        command, env=environment, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def processes_of(config: Path) -> list[psutil.Process]:
    """Living processes that this test started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MEGAROUTE_TEST") == str(config) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not (metrics.exists() and any(r.step >= step for r in read_history(metrics).train)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.1)


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    path = write_config(tmp_path, corpus)
    yield path
    for process in processes_of(path):
        process.kill()


def test_ctrl_c_saves_ends_all_ranks_and_the_run_goes_on_from_there(config):
    run = config.parent / "run"
    process = launch(config, "train.steps=100000")
    wait_for_step(run / "metrics.jsonl", 3, process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    while [other for other in processes_of(config) if other.pid != process.pid] and time.monotonic() < began + 30:
        time.sleep(0.1)
    seconds = time.monotonic() - began
    output, _ = process.communicate(timeout=60)  # the launcher writes the report of what was reached
    assert process.returncode == 130, output
    assert seconds < 10, output
    assert not processes_of(config)
    assert (run / "report.html").exists()
    (run / "report.html").unlink()
    (checkpoint,) = complete_checkpoints(run / "checkpoints")
    saved = read_run(checkpoint).step
    assert saved >= 3

    resumed = launch(config, f"train.steps={saved + 2}")
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    steps = [record.step for record in read_history(run / "metrics.jsonl").of_attempt(2)]
    assert steps == [saved + 1, saved + 2]
    assert (run / "report.html").exists()


def test_a_killed_run_leaves_only_whole_checkpoints_and_no_process(config):
    run = config.parent / "run"
    process = launch(config, "train.steps=100000", "checkpoint.every=2")
    wait_for_step(run / "metrics.jsonl", 5, process)
    process.kill()  # the supervisor itself: its ranks must notice
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while processes_of(config) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(config)
    assert complete_checkpoints(run / "checkpoints")


@pytest.mark.slow
@pytest.mark.survive
def test_a_hang_is_the_exit_code_of_the_launch_and_the_frozen_rank_is_ended(config):
    run = config.parent / "run"
    process = launch(config, "parallel.pipeline=1", "train.steps=100000", "run.hang_timeout_s=15")
    wait_for_step(run / "metrics.jsonl", 3, process)
    (frozen,) = [other for other in processes_of(config) if is_rank(other, 1)]
    frozen.suspend()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == HUNG, output
    assert not processes_of(config)
    assert "rank 1 on " in (run / "log.txt").read_text()


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Whether DeepSpeed's launcher started the process as this rank; what a rank starts inherits its variables."""
    parent = process.parent()
    return process.environ().get("RANK") == str(rank) and parent is not None and "RANK" not in parent.environ()
