"""Who may write checkpoints: among real processes, and among starts of one SLURM job."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaroute.checkpoint import lease
from megaroute.checkpoint.lease import Holder
from megaroute.common.errors import LaunchError, LeaseLostError

REPOSITORY = Path(__file__).resolve().parents[3]
HOLD = "import sys, time, pathlib; from megaroute.checkpoint.lease import take; take(pathlib.Path(sys.argv[1])); "


@pytest.fixture
def other(tmp_path):
    """Another process that has taken the lease of the folder and lives on."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", HOLD + "time.sleep(60)", str(tmp_path)], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / lease.FILE).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.wait()


def holder(**changed) -> Holder:
    return dataclasses.replace(Holder.this_process({}), token="another", **changed)


def write(root, who) -> None:
    (root / lease.FILE).write_text(json.dumps(dataclasses.asdict(who)))


def test_it_is_taken_checked_and_given_back(tmp_path):
    mine = lease.take(tmp_path / "checkpoints")
    mine.check()
    lease.take(tmp_path / "checkpoints").check()  # a process is one holder
    mine.release()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with pytest.raises(LeaseLostError, match="names nobody, not process"):
        mine.check()
    mine.release()


def test_a_second_start_beside_a_living_one_is_refused(tmp_path, other):
    with pytest.raises(LaunchError, match=f"^run.directory: .* is in use by process {other.pid} on ") as caught:
        lease.take(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(LaunchError, match="is in use by"):
        lease.check_free(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lease_of_a_dead_process_is_taken_over(tmp_path, other, number):
    other.send_signal(number)
    deadline = time.monotonic() + 30
    while not Holder(**json.loads((tmp_path / lease.FILE).read_text())).is_dead():  # before anybody reaps it, too
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lease.check_free(tmp_path)
    lease.take(tmp_path).check()


def test_a_process_id_that_has_a_new_owner_is_not_mistaken(tmp_path):
    write(tmp_path, holder(pid=os.getppid(), started=1))
    lease.take(tmp_path).check()


def test_a_later_restart_takes_over_and_the_older_one_finds_out(tmp_path, other):
    living = Holder(**json.loads((tmp_path / lease.FILE).read_text()))
    write(tmp_path, dataclasses.replace(living, job="7", restart=1))
    older = lease.Lease(tmp_path, living)
    older.check()
    lease.take(tmp_path, holder(job="7", restart=2)).check()
    with pytest.raises(LeaseLostError, match="names job 7 restart 2, process .*: another start of this run has taken"):
        older.check()


def test_an_older_restart_does_not_take_back(tmp_path, other):
    living = Holder(**json.loads((tmp_path / lease.FILE).read_text()))
    write(tmp_path, dataclasses.replace(living, job="7", restart=2, host="elsewhere"))
    with pytest.raises(LaunchError, match=r"belongs to job 7 restart 2, .* a later restart than this one \(1\)"):
        lease.take(tmp_path, holder(job="7", restart=1))


def test_who_cannot_be_asked_loses_to_who_starts_later(tmp_path):
    write(tmp_path, holder(host="elsewhere"))
    lease.take(tmp_path).check()


def test_an_older_holder_gives_nothing_back(tmp_path):
    mine = lease.take(tmp_path)
    write(tmp_path, holder(host="elsewhere"))
    mine.release()
    assert (tmp_path / lease.FILE).exists()


def test_a_lease_that_cannot_be_read_is_replaced(tmp_path):
    (tmp_path / lease.FILE).write_text("{")
    lease.take(tmp_path).check()
    assert [path.name for path in tmp_path.iterdir()] == [lease.FILE]


def test_slurm_tells_job_and_restart():
    who = Holder.this_process({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"})
    assert (who.job, who.restart, who.pid) == ("12", 3, os.getpid())
    assert str(who).startswith("job 12 restart 3, process ")
    assert (Holder.this_process({"SLURM_JOB_ID": "12"}).restart, Holder.this_process({}).job) == (0, "")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="cannot be written .*set run.directory"):
        lease.take(tmp_path / "file" / "checkpoints")
