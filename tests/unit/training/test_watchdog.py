"""Which ranks the others wait for, and what a rank tells of itself."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from megaroute.common.exit_codes import HUNG
from megaroute.training import crash
from megaroute.training.heartbeat import Beat, Board, Pulse, new_folder
from megaroute.training.watchdog import verdict, where

NOW = 1000.0


def beat(rank, **fields):
    known = {"phase": "sum over ranks", "step": 17, "still_s": 119.0, "written": NOW - 2, "place": "x.py:1 in f: g()"}
    return Beat(rank=rank, host=f"node{rank // 2}", **{**known, "waits": True, **fields})


def said(*beats, world_size=4):
    return verdict({beat.rank: beat for beat in beats}, world_size, 120.0, NOW)


def test_the_rank_that_waits_for_nobody_is_behind():
    busy = beat(3, phase="forward and backward", waits=False, still_s=121.0, place="layer.py:7 in forward: a @ b")
    assert said(beat(0), beat(1), beat(2), busy) == (
        "nothing has moved for 120 s (run.hang_timeout_s): rank 3 on node1 has been in step 17, forward and backward, "
        "for 121 s, at layer.py:7 in forward: a @ b; the others wait in step 17, sum over ranks"
    )


def test_a_rank_that_does_not_answer_is_behind_whatever_the_others_do():
    text = said(beat(0), beat(1, waits=False), beat(2), beat(3, place="", written=NOW - 140))
    assert "rank 3 on node1 was last heard of 140 s ago, in step 17, sum over ranks" in text and "rank 1 on" not in text
    assert "rank 3 has never been heard of" in said(beat(0), beat(1), beat(2))


def test_when_all_wait_the_earliest_step_decides_and_else_the_network_is_to_blame():
    assert "rank 2 on node1 has been in step 16, read" in said(
        beat(0), beat(1), beat(2, step=16, phase="read"), beat(3)
    )
    assert "every rank waits for another, none is behind" in said(*map(beat, range(4)))


def test_thousands_of_silent_ranks_make_one_short_sentence():
    text = said(beat(0), world_size=4096)
    assert "and 4091 more" in text and len(text) < 500


def test_where_a_thread_stands_and_whether_it_waits_for_other_ranks():
    entered, leave = threading.Event(), threading.Event()

    def stand():
        entered.set()
        leave.wait(60)

    thread = threading.Thread(target=stand)
    thread.start()
    entered.wait(60)
    time.sleep(0.1)
    place, waits = where(thread)
    leave.set()
    thread.join()
    assert "threading.py" in place and not waits, "an event is not another rank"


def test_a_phase_that_takes_long_by_nature_gets_longer(monkeypatch):
    pulse, clock = Pulse(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for phase, step, allowed in (("set-up", None, 20), ("read", 1, 20), ("read", 2, 10), ("save", None, 20)):
        pulse.enter(phase, step)
        clock[0] += allowed - 0.5
        assert not pulse.overdue(10)
        clock[0] += 1
        assert pulse.overdue(10), phase
        pulse.beat()
        assert not pulse.overdue(10)


def test_only_the_first_trouble_counts_and_an_earlier_start_cannot_cause_any(tmp_path):
    old = Board(new_folder(tmp_path))
    board = Board(tmp_path / "heartbeats" / "next")
    board.folder.mkdir()
    assert old.declare({"kind": "hang", "rank": 0, "message": ""})
    assert board.trouble() is None
    assert board.declare({"kind": "failure", "rank": 2, "message": "first"})
    assert not board.declare({"kind": "hang", "rank": 1, "message": "second"})
    assert board.trouble()["message"] == "first"
    board.write(beat(5))
    assert board.read() == {5: beat(5)}
    (board.folder / "rank-00006.json").write_text("{torn")
    assert board.read() == {5: beat(5)}


@pytest.mark.parametrize(
    "message",
    [
        "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4",
        "Timed out waiting 600000ms for recv",
    ],
)
def test_a_lost_rank_is_a_sentence_and_other_errors_stay_what_they_are(message):
    told = r"^rank 1 lost its connection to another rank, .* log.txt"
    with pytest.raises(crash.PeerLost, match=told), crash.lost_peers(1):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="shape mismatch"), crash.lost_peers(1):
        raise RuntimeError("shape mismatch")


GOES_ON_THEN_HANGS = """
import sys, time
from pathlib import Path
from megaroute.training.heartbeat import Board, Pulse, new_folder
from megaroute.training.watchdog import Watchdog

run_dir, pulse = Path(sys.argv[1]), Pulse()
pulse.enter("read", 1), pulse.enter("read", 2)
with Watchdog(Board(new_folder(run_dir)), pulse, 4.0, 0, 1, run_dir):
    while not (run_dir / "hang").exists():
        pulse.beat()
        (run_dir / "beats").touch()
        work = time.process_time() + 0.3
        while time.process_time() < work:
            pass
    time.sleep(60)
"""


def test_a_run_that_was_suspended_goes_on_and_still_ends_when_it_hangs(tmp_path):
    """SLURM's PreemptMode=SUSPEND stops every process of a job with SIGSTOP."""
    run = subprocess.Popen([sys.executable, "-c", GOES_ON_THEN_HANGS, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "beats").exists)
    run.send_signal(signal.SIGSTOP)
    time.sleep(6)
    (tmp_path / "beats").unlink(missing_ok=True)
    run.send_signal(signal.SIGCONT)
    wait_for((tmp_path / "beats").exists)
    time.sleep(1)
    assert run.poll() is None
    (tmp_path / "hang").touch()
    assert run.wait(timeout=60) == HUNG
    assert "nothing has moved for 4 s" in run.communicate()[1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
