"""Rows from worker processes: the same rows in the same order as without them."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from megaroute.common.errors import DataError, MegarouteError
from megaroute.data.maker import Recipe
from megaroute.data.rows import LaneState, Row
from megaroute.data.worker import Failure, Task

GRACE_S = 2.0
"""Seconds in which a worker ends once nobody reads its rows."""


class WorkerError(MegarouteError):
    """A data worker died, failed, or made no row in time."""


class RowWorkers:
    """Rows first, first + step, .. of the run, made in turn by `count` processes that work ahead.

    Worker w makes every count-th row from first + w * step on.  Processes are started fresh, not forked, and import
    neither torch nor whatever started the run.
    """

    def __init__(
        self,
        recipe: Recipe,
        first: int,
        step: int,
        states: Mapping[int, LaneState],
        *,
        count: int,
        prefetch: int,
        timeout_s: float,
    ) -> None:
        self._timeout_s, self._turn = timeout_s, 0
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        try:
            for _ in range(count):
                self._workers.append(_start())
            for number, (process, _) in enumerate(self._workers):
                offset = first + number * step
                mine = {lane: state for lane, state in states.items() if (lane - offset) % (count * step) == 0}
                _give(process, Task(recipe, offset, count * step, mine, prefetch))
        except BaseException:
            self.close()
            raise

    @property
    def processes(self) -> list[int]:
        """Process ids, for tests and tools."""
        return [process.pid for process, _ in self._workers]

    def next_row(self) -> Row:
        """The next row.

        Raises DataError when a document cannot be read, WorkerError when the worker whose turn it is has died, or made
        no row for `timeout_s` seconds.
        """
        process, rows = self._workers[self._turn]
        try:
            if not rows.poll(self._timeout_s):
                raise WorkerError(
                    f"data worker {self._turn} (process {process.pid}) made no row for {self._timeout_s:g} s, so the "
                    f"run would wait for ever; look at the storage of the shards, or raise data.worker_timeout_s"
                )
            item = rows.recv()
        except (EOFError, OSError) as error:
            raise self._death(process) from error
        if isinstance(item, Failure):
            raise DataError(item.text) if item.is_input else WorkerError(f"data worker {self._turn}: {item.text}")
        assert isinstance(item, Row)
        self._turn = (self._turn + 1) % len(self._workers)
        return item

    def close(self) -> None:
        """End the workers; none is left when this returns."""
        for _, rows in self._workers:
            rows.close()
        deadline = time.monotonic() + GRACE_S
        for process, _ in self._workers:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []

    def _death(self, process: "subprocess.Popen[bytes]") -> WorkerError:
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return WorkerError(
            f"data worker {self._turn} (process {process.pid}) {how}, so rows are missing; if memory ran out, lower "
            f"data.workers or data.prefetch, and start the run again: it goes on from its newest checkpoint"
        )


def _start() -> "tuple[subprocess.Popen[bytes], Connection]":
    """A worker that waits for its task, and the pipe of its rows."""
    rows, theirs = Pipe(duplex=False)
    command = [sys.executable, "-c", "from megaroute.data.worker import main; main()", str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()  # so that the pipe ends when the worker does
    return process, rows


def _give(process: "subprocess.Popen[bytes]", task: Task) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stdin:  # of a worker that died the first row will tell
        pickle.dump(task, stdin, protocol=5)
