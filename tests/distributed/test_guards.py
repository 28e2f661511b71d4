"""Real ranks that hang, fail, drift apart or are asked to stop: all of them end in time, and say why."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port, rank_environment
from training import Ranks, write_config

from megaroute.checkpoint.layout import complete_checkpoints, read_run
from megaroute.common.exit_codes import FAILED, FINISHED, HUNG, STOPPED
from megaroute.metrics.history import read_history
from megaroute.metrics.report import write_report

pytestmark = [pytest.mark.survive, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "faulty_rank.py"


class Group:
    """Ranks of one run, each in a session of its own; `log(rank)` is what one has said."""

    def __init__(self, config: Path, world_size: int, overrides: tuple[str, ...], fault: dict[str, Any]) -> None:
        self.folder, self.run = config.parent, config.parent / "run"
        (self.folder / "fault.json").write_text(json.dumps(fault))
        command = [sys.executable, str(SCRIPT), str(self.folder / "fault.json"), str(config), *overrides]
        port = free_port()
        self.ranks = []
        for rank in range(world_size):
            with open(self.folder / f"log-{rank}.txt", "w") as log:
                environment = rank_environment(rank, world_size, port)
                self.ranks.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}.txt").read_text()

    def codes(self, timeout_s: float = 300) -> list[int]:
        """Exit codes, when all ranks have ended."""
        deadline = time.monotonic() + timeout_s
        while any(rank.poll() is None for rank in self.ranks):
            assert time.monotonic() < deadline, "\n".join(self.log(rank)[-2000:] for rank in range(len(self.ranks)))
            time.sleep(0.05)
        return [rank.returncode for rank in self.ranks]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert time.monotonic() < deadline, self.log(0)[-2000:]
            assert all(rank.poll() is None for rank in self.ranks), self.log(0)[-2000:]
            time.sleep(0.02)

    def events(self, kind: str) -> list[Any]:
        return [event for event in read_history(self.run / "metrics.jsonl").events if event.kind == kind]

    @property
    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return max((record.step for record in read_history(path).train), default=0) if path.exists() else 0


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Group]]:
    """`start(world_size, overrides.., kind=.., rank=.., step=..)`: a group, whose processes end with the test."""
    groups = []

    def start(world_size: int, *overrides: str, **fault: Any) -> Group:
        groups.append(Group(write_config(tmp_path, corpus), world_size, overrides, fault))
        return groups[-1]

    yield start
    for group in groups:
        for rank in group.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def blocks_usr1(process: subprocess.Popen) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"^SigBlk:\s*(\w+)", status, re.M)[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def test_a_rank_that_stalls_is_named_with_its_place_and_all_ranks_end(start):
    group = start(2, "run.hang_timeout_s=12", kind="sleep", rank=1, step=4)
    assert group.codes() == [HUNG, HUNG]
    text = (group.run / "log.txt").read_text()
    (sentence,) = [line for line in text.splitlines() if "nothing has moved" in line]
    assert re.search(r"rank 1 on \S+ has been in step 3, done, for 1\d s, at .*faulty_rank.py:\d+ in sleep", sentence)
    assert sentence.count("has been in") == 1, sentence
    assert "the others wait in step 4, sum over ranks" in sentence or "the others wait in step 4, forward" in sentence
    for rank, function in ((0, "run_step"), (1, "sleep")):
        stacks = (group.run / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {rank} on " in stacks and f"in {function}" in stacks
    (event,) = group.events("error")
    assert event.step == 3 and event.message.startswith("hung: nothing has moved") and len(event.values["ranks"]) == 2
    assert "hung: nothing has moved" in write_report(group.run).read_text()


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_named_by_the_others(start):
    group = start(2, "run.hang_timeout_s=12")
    group.wait_for(lambda: group.steps >= 2)
    group.ranks[1].send_signal(signal.SIGSTOP)
    assert group.ranks[0].wait(120) == HUNG
    assert re.search(r"rank 1 on \S+ was last heard of \d+ s ago, in ", (group.run / "log.txt").read_text())


def test_a_rank_that_fails_ends_the_others_and_leaves_its_trace(start):
    group = start(2, kind="fail", rank=1, step=3)
    assert group.codes(60) == [FAILED, FAILED]
    text = (group.run / "log.txt").read_text()
    assert "[rank 1] Traceback" in text and "ValueError: a fault of this rank alone" in text
    assert "[rank 0] rank 0 lost its connection to another rank" in text
    assert "Traceback" not in group.log(0), group.log(0)
    first = group.events("error")[0]
    assert first.message == "failed on rank 1: ValueError: a fault of this rank alone"


@pytest.mark.parametrize(
    "layout, name",
    [
        pytest.param("parallel.tensor=2", "decoder.layers.2.units.layer.router.weight", id="tensor ranks"),
        pytest.param(
            "parallel.tensor=1", "decoder.layers.1.mlp.linear_fc2.weight", id="replicas", marks=pytest.mark.slow
        ),
    ],
)
def test_one_flipped_bit_is_found_by_name_and_nothing_is_saved_any_more(start, layout, name):
    # A save beside training may still be on its way when the run ends.
    every = ["train.desync_every=4", "checkpoint.every=2", "checkpoint.asynchronous=false"]
    group = start(2, layout, *every, kind="flip", rank=1, step=8, name=name)
    assert group.codes() == [FAILED, FAILED]
    text = (group.run / "log.txt").read_text()
    assert f"in step 8 {name} of stage 0 has one value on rank " in text, text
    assert re.search(r"on rank \d \(\S+\) and another on rank \d \(\S+\) \(train.desync_every=4\)", text), text
    assert group.steps == 7 and read_run(complete_checkpoints(group.run / "checkpoints")[-1]).step == 6
    assert name in group.events("error")[0].message


@pytest.mark.slow
def test_one_flipped_bit_is_found_by_a_later_check(start):
    group = start(
        2,
        "parallel.tensor=2",
        "train.desync_every=4",
        kind="flip",
        rank=0,
        step=6,
        name="decoder.final_layernorm.weight",
    )
    assert group.codes() == [FAILED, FAILED]
    assert "in step 8 " in group.events("error")[0].message


LAYOUTS = {
    "tensor": ["parallel.tensor=2"],
    "sequence": ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=full"],
    "tied pipeline": ["parallel.pipeline=2", "model.tie_embeddings=true"],
    "replicas in bf16": ["train.precision=bf16"],
    "experts": ["parallel.tensor=2", "routing.router=moe", "routing.unit=mlp"],
}


ROLLBACK = ("train.steps=14", "optim.decay_steps=14", "checkpoint.every=4", "checkpoint.keep=9")
ROLLBACK += ("train.rollback_after=2", "train.micro_batch=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [("parallel.data=2",), ("parallel.tensor=2", "parallel.sequence=true")], ids=" ".join
)
def test_all_ranks_go_back_when_one_of_them_has_no_number_twice(start, layout):
    group = start(2, *ROLLBACK, *layout, kind="nan", rank=1, step=[9, 10])
    assert group.codes() == [FINISHED] * 2
    (told,) = [event for event in group.events("alarm") if "rollback" in event.values]
    assert told.step == 10 and "are those of step 8 again" in told.message
    history = read_history(group.run / "metrics.jsonl")
    assert [record.skipped_update for record in history.train] == [step in (9, 10) for step in range(1, 15)]
    assert all(math.isfinite(record.loss) for record in history.train if record.step not in (9, 10))
    # The weights after it are those of step 8, updated with the rows that follow the bad ones: as one process has them.
    alone = start(1, *ROLLBACK, "run.directory=" + str(group.folder / "alone"), kind="nan", rank=0, step=[9, 10])
    assert alone.codes() == [FINISHED]
    single = read_history(group.folder / "alone" / "metrics.jsonl")
    for expected, found in zip(single.train, history.train, strict=True):
        if expected.step not in (9, 10):
            assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow
def test_a_sound_run_raises_no_alarm_on_any_layout(corpus, tmp_path):
    ranks = Ranks(write_config(tmp_path, corpus), tmp_path)
    runs = {
        name: [*layout, "train.desync_every=1", f"run.directory={tmp_path / name}"] for name, layout in LAYOUTS.items()
    }
    assert ranks.train(2, runs, steps=3).keys() == LAYOUTS.keys()


@pytest.mark.slow
def test_a_sound_run_of_four_ranks_raises_no_alarm(corpus, tmp_path):
    ranks = Ranks(write_config(tmp_path, corpus), tmp_path)
    both = ["parallel.tensor=2", "train.desync_every=1", "parallel.sequence=true", "model.tie_embeddings=true"]
    runs = {
        "tp x pp": [*both, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.batch_p2p=false"],
        "tp x dp": [*both, f"run.directory={tmp_path / 'other'}"],
    }
    assert ranks.train(4, runs, steps=3).keys() == runs.keys()


def test_a_warning_to_one_rank_before_torch_is_loaded_stops_all_before_the_first_step(start):
    group = start(2)
    group.wait_for(lambda: blocks_usr1(group.ranks[1]))
    group.ranks[1].send_signal(signal.SIGUSR1)
    assert group.codes() == [STOPPED, STOPPED]
    assert group.steps == 0 and complete_checkpoints(group.run / "checkpoints") == []
    assert group.events("stop")[0].message.startswith("asked to stop before the first step")


def test_signals_to_whole_groups_again_and_again_save_once_and_the_run_goes_on(start):
    group = start(2, "data.workers=1", "checkpoint.every=3", "train.steps=100000")
    group.wait_for(lambda: group.steps >= 4)  # the warm-up is over, so that a run may end soon after
    while any(rank.poll() is None for rank in group.ranks):  # data workers and checkpoint writers get them, too
        for rank in group.ranks:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, number)
        time.sleep(0.01)
    assert group.codes() == [STOPPED, STOPPED], group.log(0)
    saved = read_run(complete_checkpoints(group.run / "checkpoints")[-1]).step
    assert saved == group.steps
    again = start(2, f"train.steps={saved + 1}", "optim.decay_steps=100000")
    assert again.codes() == [FINISHED, FINISHED], again.log(0)
    assert again.steps == saved + 1
