"""Ends a run that hangs, and says which rank it waits for; ends the ranks whose neighbour has failed."""

import faulthandler
import linecache
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megaroute.common.exit_codes import FAILED, HUNG, LOST
from megaroute.launch import exits
from megaroute.training import crash
from megaroute.training.heartbeat import FAILURE, HANG, Beat, Board, Pulse

LATE_S = 10.0
"""Seconds that a rank gets to end by itself when another one has failed."""

_LONGEST_TICK_S = 10.0
_WAITS = re.compile(r"\b(wait|synchronize)\(|run_backward")
"""Source lines of torch and Megatron-core in which a rank stands when it needs something of another one."""
_READS_DEVICE = re.compile(r"\.(item|tolist|cpu)\(")
"""Source lines of anybody in which it waits for its device, which may wait for another one's."""


class Watchdog:
    """A thread that writes down what its rank does and ends the process, with exit code HUNG, when nothing moves.

    The first rank to find that its main thread has not moved for too long declares it.  Every rank then leaves the
    stacks of its threads in `stacks/` of the run directory and says whether it waits for others; the one that declared
    it says in `log.txt` and in the metrics who is behind.  Nothing is torn down: that could hang as well.
    """

    def __init__(self, board: Board, pulse: Pulse, timeout_s: float, rank: int, world_size: int, run_dir: Path) -> None:
        self._board, self._pulse, self._timeout_s = board, pulse, timeout_s
        self._rank, self._world_size, self._run_dir = rank, world_size, run_dir
        self._host, self._main = socket.gethostname(), threading.main_thread()
        self._tick_s = min(timeout_s / 20, _LONGEST_TICK_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        with suppress(OSError):
            self._board.write(self._beat())  # at once: a rank that freezes at its first step has a host, too
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join()
        if isinstance(error, Exception):
            self._tell_failure(error)
            # What follows ends communication, which must not wait for ever for ranks that do not answer.
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)

    def _run(self) -> None:
        while not self._pause():
            # This thread may be stuck too: without Python's lock, or writing to a disk that hangs.
            faulthandler.dump_traceback_later(10 * self._tick_s + 2 * self._timeout_s, exit=True)
            try:
                self._look()
            except OSError as error:  # a full disk ends the run elsewhere, with better words
                crash.say(self._run_dir, self._rank, f"the watchdog cannot write to {self._board.folder}: {error}")
                break
        faulthandler.cancel_dump_traceback_later()

    def _pause(self) -> bool:
        """Wait for the next look; whether it is the end.

        A wait that takes much longer was that of a stopped process: SLURM suspends jobs, and a virtual machine may be
        paused.  When all goes on, no rank has missed its time.
        """
        began = time.monotonic()
        ending = self._closing.wait(self._tick_s)
        late = time.monotonic() - began - self._tick_s
        if late > self._tick_s:
            self._pulse.excuse(late)
        return ending

    def _look(self) -> None:
        self._board.write(self._beat())
        trouble = self._board.trouble()
        if trouble is None and self._pulse.overdue(self._timeout_s):
            self._board.declare({"kind": HANG, "rank": self._rank, "message": ""})
            trouble = self._board.trouble()
        if trouble is not None and trouble["kind"] == HANG:
            self._end_of_hang(declared=trouble["rank"] == self._rank)
        elif trouble is not None and trouble["rank"] != self._rank:
            self._end_after(trouble)

    def _beat(self, **found: Any) -> Beat:
        pulse, now = self._pulse, time.monotonic()
        return Beat(self._rank, self._host, pulse.phase, pulse.step, now - pulse.moved, time.time(), **found)

    def _end_of_hang(self, declared: bool) -> None:
        place, waits = where(self._main)
        beat = self._beat(place=place, waits=waits)
        self._dump(beat)
        self._board.write(beat)
        deadline = time.monotonic() + 5 * self._tick_s + 2.0
        if declared:
            while time.monotonic() < deadline and len(_found(self._board.read())) < self._world_size:
                time.sleep(self._tick_s / 5)
            self._report()
            self._board.close_case()
        while time.monotonic() < deadline + 10.0 and not self._board.closed:
            time.sleep(self._tick_s / 5)
        exits.write(
            HUNG, f"no step for {self._timeout_s:g} s; log.txt says which rank hangs, {self._run_dir / 'stacks'} where"
        )
        os._exit(HUNG)

    def _dump(self, beat: Beat) -> None:
        folder = self._run_dir / "stacks"
        folder.mkdir(exist_ok=True)
        with open(folder / f"rank-{beat.rank:05d}.txt", "a", encoding="utf-8") as file:
            day = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"--- {day} {beat.who}: {beat.doing}, for {beat.still_s:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _report(self) -> None:
        beats = self._board.read()
        message = verdict(beats, self._world_size, self._timeout_s, time.time())
        message += f"; stacks of all ranks are in {self._run_dir / 'stacks'}; started again, the run goes on from its "
        message += "newest checkpoint"
        crash.say(self._run_dir, self._rank, message)
        values = {"ranks": [f"{beat.who}: {beat.doing}, at {beat.place or '?'}" for _, beat in sorted(beats.items())]}
        crash.record(self._run_dir, f"hung: {message}", values)

    def _tell_failure(self, error: Exception) -> None:
        if isinstance(error, crash.PeerLost):
            return  # the other one has better words
        try:
            self._board.declare({"kind": FAILURE, "rank": self._rank, "message": str(error)[:300]})
        except OSError:
            return

    def _end_after(self, trouble: Mapping[str, Any]) -> None:
        """Another rank has failed: collectives with it fail at once on gloo, and on NCCL not before their timeout."""
        if self._closing.wait(LATE_S):
            return
        crash.say(
            self._run_dir,
            self._rank,
            f"rank {trouble['rank']} has failed ({trouble['message']}), and this one waits for it: ended in step "
            f"{self._pulse.step}, {self._pulse.phase}",
        )
        exits.write(LOST, f"rank {trouble['rank']} has failed, and this one waited for it")
        os._exit(FAILED)


def verdict(beats: Mapping[int, Beat], world_size: int, timeout_s: float, now: float) -> str:
    """Which ranks the others wait for: those that do not answer, else those that wait for nobody, else the last ones.

    Args:
        beats: by rank, those of ranks that answered with their place.
        now: time by the clock, in seconds.
    """
    silent = [rank for rank in range(world_size) if rank not in _found(beats)]
    running = [beat for _, beat in sorted(_found(beats).items()) if not beat.waits]
    behind = [_silence(rank, beats.get(rank), now) for rank in silent] or [_behind(beat) for beat in running]
    if not behind:
        first = min(beat.step for beat in beats.values())
        late = [beat for _, beat in sorted(beats.items()) if beat.step == first]
        some = late if len(late) < world_size else []
        behind = [_behind(beat) for beat in some] or [
            "every rank waits for another, none is behind: look at the network"
        ]
    shown = "; ".join(behind[:4]) + (f"; and {len(behind) - 4} more" if len(behind) > 4 else "")
    others = sorted({beat.doing for beat in beats.values() if beat.waits})
    waiting = f"; the others wait in {' and in '.join(others[:3])}" if others else ""
    return f"nothing has moved for {timeout_s:g} s (run.hang_timeout_s): {shown}{waiting}"


def where(thread: threading.Thread) -> tuple[str, bool]:
    """File, line and function in which a thread stands, and whether it, or a thread of autograd, waits there."""
    frames = sys._current_frames()
    frame = frames.get(thread.ident or 0)
    if frame is None:
        return "?", False
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    foreign = re.search(r"/(torch|megatron)/", code.co_filename) is not None
    waits = _READS_DEVICE.search(line) is not None or (foreign and _WAITS.search(line) is not None)
    at: Any = frame
    while at is not None and not waits:
        waits = "distributed_c10d" in at.f_code.co_filename
        at = at.f_back
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}: {line}", waits


def _found(beats: Mapping[int, Beat]) -> dict[int, Beat]:
    return {rank: beat for rank, beat in beats.items() if beat.place}


def _behind(beat: Beat) -> str:
    return f"{beat.who} has been in {beat.doing}, for {beat.still_s:.0f} s, at {beat.place}"


def _silence(rank: int, beat: Beat | None, now: float) -> str:
    if beat is None:
        return f"rank {rank} has never been heard of"
    return f"{beat.who} was last heard of {now - beat.written:.0f} s ago, in {beat.doing}: stopped, dead or cut off"
