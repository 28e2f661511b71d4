"""The supervisor of a local run, on real processes: what every signal and every death leads to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from megaroute.launch.command import free_port

SCRIPTS = Path(__file__).parent / "scripts"
REPOSITORY = Path(__file__).resolve().parents[3]
STANDIN = [str(SCRIPTS / "standin_launcher.py"), "2"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--log_level", "critical", "--hostfile", os.devnull]
DEEPSPEED += ["--num_accelerators", "2", "--no_local_rank", "--master_port"]


class SupervisedRun:
    """Two ranks under the supervisor, and what to ask about them."""

    def __init__(self, folder: Path, behaviour: str, launcher: list[str], grace_s: float, nohup: bool) -> None:
        self.folder = folder
        command = [sys.executable, *launcher, str(SCRIPTS / "rank.py"), str(folder), behaviour]
        supervise = [sys.executable, str(SCRIPTS / "supervise.py"), str(grace_s), *command]
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        # Whether a hang-up is ignored is inherited, also from who started the tests.
        hangup = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        self.supervisor = subprocess.Popen(supervise, env=environment, start_new_session=True, preexec_fn=hangup)
        self.everybody: list[psutil.Process] = []

    def wait_until_up(self) -> None:
        files = [self.folder / f"rank{rank}.up" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() and len(file.read_text().split()) == 3 for file in files), 60)
        self.launch_pid = int(files[0].read_text().split()[2])
        self.runner_pid = psutil.Process(self.launch_pid).ppid()
        self.everybody = psutil.Process(self.supervisor.pid).children(recursive=True)
        assert len(self.everybody) >= 6  # two launcher processes, two ranks, two helpers

    def saved(self) -> list[int]:
        return [rank for rank in (0, 1) if (self.folder / f"rank{rank}.saved").exists()]

    def status(self) -> int:
        return self.supervisor.wait(timeout=30)

    def survivors(self) -> list[psutil.Process]:
        return [process for process in self.everybody if process.is_running() and process.status() != "zombie"]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path):
    runs: list[SupervisedRun] = []

    def start_run(
        behaviour: str, launcher: list[str] = STANDIN, grace_s: float = 60, nohup: bool = False
    ) -> SupervisedRun:
        runs.append(SupervisedRun(tmp_path, behaviour, launcher, grace_s, nohup))
        return runs[-1]

    yield start_run
    for run in runs:
        for process in [*run.survivors(), run.supervisor]:
            with suppress(psutil.Error):
                process.kill()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)], ids=str)
def test_ranks_save_and_stop_when_the_supervisor_is_asked(start, number, status):
    run = start("save")
    run.wait_until_up()
    run.supervisor.send_signal(number)
    assert run.status() == status
    assert run.saved() == [0, 1]
    assert run.survivors() == []


def test_hangup_that_is_ignored_stays_so(start):
    run = start("save", nohup=True)
    run.wait_until_up()
    run.supervisor.send_signal(signal.SIGHUP)
    run.supervisor.send_signal(signal.SIGINT)
    assert run.status() == 130  # the interrupt was the first request
    assert run.saved() == [0, 1]


def test_helper_that_outlives_its_rank_is_neither_waited_for_nor_left_behind(start):
    run = start("forget")
    run.wait_until_up()
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.status() == 75
    assert run.saved() == [0, 1]
    assert run.survivors() == []


def test_ranks_that_do_not_stop_are_killed_after_the_grace_time(start):
    run = start("stubborn", grace_s=1)
    run.wait_until_up()
    asked = time.monotonic()
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.status() == 143
    assert 1 <= time.monotonic() - asked < 6
    assert run.survivors() == []


def test_second_request_kills_at_once(start):
    run = start("stubborn", grace_s=60)
    run.wait_until_up()
    run.supervisor.send_signal(signal.SIGINT)
    time.sleep(1)
    run.supervisor.send_signal(signal.SIGINT)
    assert run.status() == 130
    assert run.survivors() == []


def test_signal_given_twice_within_a_moment_is_one_request(start):
    run = start("save")
    run.wait_until_up()
    run.supervisor.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.supervisor.send_signal(signal.SIGINT)
    assert run.status() == 130
    assert run.saved() == [0, 1]


def test_request_before_any_rank_ends_the_launcher(start):
    run = start("save", launcher=["-c", "import time; time.sleep(60)"])
    supervisor = psutil.Process(run.supervisor.pid)
    wait_for(lambda: len(supervisor.children()) == 1, 20)
    run.everybody = supervisor.children()
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.status() == 143
    assert run.survivors() == []


def test_status_of_the_rank_that_failed_is_kept(start):
    run = start("2")
    assert run.status() == 2


def test_rank_killed_by_a_signal_gives_the_shells_status(start):
    # 247 is 256 - 9, which a Python launcher makes of sys.exit(-9).
    run = start("247")
    assert run.status() == 128 + 9


@pytest.mark.parametrize("victim", ["runner_pid", "launch_pid"])
def test_ranks_save_and_stop_when_a_launcher_process_dies(start, victim):
    run = start("save")
    run.wait_until_up()
    os.kill(getattr(run, victim), signal.SIGKILL)
    assert run.status() not in (0, 75)
    assert run.saved() == [0, 1]
    assert run.survivors() == []


@pytest.mark.parametrize("behaviour, saved", [("save", [0, 1]), ("stubborn", [])])
def test_ranks_stop_when_the_supervisor_dies(start, behaviour, saved):
    run = start(behaviour)
    run.wait_until_up()
    run.supervisor.kill()
    wait_for(lambda: not [process for process in run.survivors() if "time.sleep" not in str(process.cmdline())], 10)
    assert run.saved() == saved


def test_deepspeeds_launcher_behaves_as_the_supervisor_expects(start):
    run = start("save", launcher=[*DEEPSPEED, str(free_port())])
    run.wait_until_up()
    run.supervisor.send_signal(signal.SIGTERM)
    assert run.status() == 75
    assert run.saved() == [0, 1]
    assert run.survivors() == []


def test_ranks_outlive_deepspeeds_launcher_only_to_save(start):
    run = start("save", launcher=[*DEEPSPEED, str(free_port())])
    run.wait_until_up()
    os.kill(run.launch_pid, signal.SIGKILL)
    assert run.status() == 1
    assert run.saved() == [0, 1]
    assert run.survivors() == []
