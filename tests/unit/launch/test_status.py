"""The status file and the table of runs."""

import json
import os
from dataclasses import replace

import pytest

from megaroute.cli import main
from megaroute.common.errors import LaunchError
from megaroute.launch import status
from megaroute.launch.exits import Outcome
from megaroute.launch.status import Attempt, Status

ATTEMPT = Attempt("71", 0, ("node1", "node2"), "2026-01-01T00:00:00+00:00", 0)
RUNNING = Status("running", job="71", hosts=("node1", "node2"), attempts=(ATTEMPT,))


def test_file_comes_back_as_it_was_with_time_and_last_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 7, "loss": 2.5}\n{"kind": "valid", "step": 7}\n{"ki'
    )
    written = status.write(tmp_path, RUNNING)
    assert status.read(tmp_path) == written
    assert written.step == 7
    assert written.updated
    assert status.read(tmp_path / "elsewhere") is None


def test_end_of_an_attempt_is_kept(tmp_path):
    ended = status.write(tmp_path, RUNNING.ended(Outcome("died", "rank 3 ended", 69), 40))
    (last,) = status.read(tmp_path).attempts
    assert (last.ending, last.why, last.last_step) == ("died", "rank 3 ended", 40)
    assert ended.attempts[0].hosts == ("node1", "node2")


def test_file_of_somebody_else_is_named(tmp_path):
    (tmp_path / status.FILE_NAME).write_text('{"state": 3}')
    with pytest.raises(LaunchError, match=r"status.json cannot be read"):
        status.read(tmp_path)


def test_newest_checkpoint_is_a_complete_one(tmp_path):
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        if step < 30:
            (tmp_path / "checkpoints" / f"step-{step:08d}" / "complete.json").touch()
    assert status.checkpoint_step(tmp_path) == 20


def test_table_has_a_line_for_each_run(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1200, "loss": 2.5}\n')
    status.write(run, replace(RUNNING, state="requeued", why="asked to stop, and saved"))
    assert main(["status", str(run), str(other)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["RUN", "STATE", "JOB", "ATTEMPT", "STEP", "LOSS", "SAVED", "SEEN", "HOSTS", "WHY"]
    assert first.split()[1:7] == ["requeued", "71", "1", "1,200", "2.500", "0"]
    assert first.endswith("node1,node2  asked to stop, and saved")
    assert second.endswith("no such directory")
    assert head.index("STATE") == first.index("requeued")


def test_running_job_that_fell_silent_is_marked(tmp_path):
    status.write(tmp_path, RUNNING)
    tree = json.loads((tmp_path / status.FILE_NAME).read_text())
    tree["updated"] = "2026-01-01T00:00:00+00:00"
    (tmp_path / status.FILE_NAME).write_text(json.dumps(tree))
    line = status.table([tmp_path]).splitlines()[1]
    assert "running?" in line
    assert "no sign of job 71 for" in line


def by_hand(run, *events):
    lines = [{"kind": "start", "attempt": 1}, {"kind": "train", "step": 4, "attempt": 1, "loss": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *events]))
    beat = run / "heartbeats" / "now" / "rank-00000.json"
    beat.parent.mkdir(parents=True)
    beat.write_text(json.dumps({"rank": 0, "host": "node7"}))
    return beat


@pytest.mark.parametrize(
    "events, state, why",
    [
        ([], "running", "-"),
        ([{"kind": "end", "attempt": 1, "message": "finished 4 steps"}], "finished", "finished 4 steps"),
        ([{"kind": "stop", "attempt": 1, "message": "asked to stop"}], "stopped", "asked to stop"),
        ([{"kind": "error", "attempt": 1, "message": "hung: rank 3"}], "failed", "hung: rank 3"),
        ([{"kind": "error", "attempt": 1}, {"kind": "start", "attempt": 2}], "running", "-"),
    ],
    ids=["running", "finished", "stopped", "failed", "again"],
)
def test_run_that_no_job_has_started_shows_what_its_ranks_wrote(tmp_path, events, state, why):
    by_hand(tmp_path, *events)
    line = status.table([tmp_path]).splitlines()[1]
    attempt = "2" if len(events) == 2 else "1"
    assert line.split()[1:6] == [state, "-", attempt, "4", "2.500"]
    assert line.endswith(f"node7  {why}")


def test_run_that_no_job_has_started_and_that_fell_silent_is_marked(tmp_path):
    beat = by_hand(tmp_path)
    for path in (beat, tmp_path / "metrics.jsonl"):
        os.utime(path, (1e9, 1e9))
    line = status.table([tmp_path]).splitlines()[1]
    assert line.split()[1] == "running?" and "no sign of it for" in line


def test_folder_without_a_run_says_so(tmp_path):
    assert status.table([tmp_path]).endswith("no step yet")


@pytest.mark.parametrize(
    "seconds, shown", [(3, "3 s"), (119, "119 s"), (600, "10 min"), (9000, "2 h"), (200_000, "2 d")]
)
def test_duration(seconds, shown):
    assert status.duration(seconds) == shown
