"""A rank that fails leaves its reason in the log, the metrics and the report."""

import pytest

from megaroute.launch.rundir import prepare_run_directory
from megaroute.metrics.history import read_history
from megaroute.metrics.report import write_report
from megaroute.training import crash, loop
from megaroute.training.guards import TrainingDiverged
from megaroute.training.heartbeat import Board
from megaroute.training.observer import Observer


def fail(run_dir, error, rank=0):
    with pytest.raises(type(error)), crash.logged(run_dir, rank), crash.recorded(run_dir, rank):
        raise error


def test_the_report_says_how_a_failed_attempt_ended(start, tiny, monkeypatch):
    config = tiny("checkpoint.resume=false")
    prepare_run_directory(config)
    parts = start(config)
    observer = Observer(parts, num_parameters=1000)
    run_step, steps = loop.run_step, iter((1, 0))
    monkeypatch.setattr(loop, "run_step", lambda *a: run_step(*a) if next(steps) else 1 / 0)
    with pytest.raises(ZeroDivisionError), crash.recorded(config.run_directory, 0):
        loop.run(parts, observer)
    observer.close()
    last = read_history(config.run_directory / "metrics.jsonl").events[-1]
    assert (last.kind, last.step, last.attempt) == ("error", 1, 1)
    page = write_report(config.run_directory).read_text()
    assert page.count("failed on rank 0: ZeroDivisionError: division by zero") == 2  # of the run, and of its attempt


@pytest.mark.parametrize("kind, told", [("hang", 0), ("failure", 1)])
def test_ranks_that_lose_each_other_at_the_end_of_a_hang_give_no_second_reason(start, tiny, tmp_path, kind, told):
    config, board = tiny("checkpoint.resume=false"), Board(tmp_path)
    prepare_run_directory(config)
    Observer(start(config), num_parameters=1000).close()
    board.declare({"kind": kind, "rank": 1, "message": ""})
    with pytest.raises(crash.PeerLost), crash.recorded(config.run_directory, 0, board):
        raise crash.PeerLost("rank 0 lost its connection to another rank")
    events = read_history(config.run_directory / "metrics.jsonl").events
    assert sum(event.kind == "error" for event in events) == told


def test_the_log_has_the_traceback_of_a_fault_and_the_sentence_of_a_refusal(tmp_path):
    fail(tmp_path, ValueError("a bug"), rank=3)
    fail(tmp_path, TrainingDiverged("4 steps in a row"))
    text = (tmp_path / "log.txt").read_text()
    assert "[rank 3] Traceback" in text and "ValueError: a bug" in text
    assert text.endswith("[rank 0] 4 steps in a row\n")


def test_what_cannot_be_written_does_not_hide_the_failure(tmp_path):
    fail(tmp_path / "gone", ValueError("the reason"))


def test_before_an_attempt_has_begun_only_the_log_knows(tmp_path):
    with pytest.raises(ValueError, match="early"), crash.logged(tmp_path, 0):
        raise ValueError("early")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
