"""A process that makes rows, started by `workers.py` and by nobody else.

The task comes on standard input; rows go to the pipe FD, made ahead as far as the queue allows.  The process lives as
long as somebody reads that pipe, and no longer, however the reader ended.
"""

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megaroute.common.errors import UserError
from megaroute.data.maker import Recipe, RowMaker
from megaroute.data.rows import LaneState, Row

# The rank decides when to stop: it still needs rows after a signal that asks it to.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Task:
    """What one worker makes."""

    recipe: Recipe
    first: int
    """Its first row."""
    step: int
    """From one of its rows to the next."""
    states: Mapping[int, LaneState]
    """State of each of its lanes that has made rows."""
    prefetch: int
    """Rows made ahead."""


@dataclass(frozen=True)
class Failure:
    """Why a worker makes no more rows."""

    text: str
    is_input: bool
    """Whether the user's input is wrong, rather than this package."""


def main() -> None:
    """Make rows until nobody reads them; the one argument is the number of the pipe."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    task = pickle.load(sys.stdin.buffer)
    assert isinstance(task, Task)
    ready: queue.Queue[Row | Failure] = queue.Queue(task.prefetch)
    rows = Connection(int(sys.argv[1]), readable=False)
    threading.Thread(target=_send, args=(rows, ready), daemon=True).start()
    try:
        maker = RowMaker(task.recipe, task.first, task.step, task.states)
        while True:
            ready.put(maker.next_row())
    except UserError as error:
        ready.put(Failure(str(error), is_input=True))
    except BaseException:
        ready.put(Failure(traceback.format_exc(), is_input=False))
    threading.Event().wait()  # the sender ends the process


def _send(rows: Connection, ready: "queue.Queue[Row | Failure]") -> None:
    try:
        while True:
            item = ready.get()
            rows.send(item)
            if isinstance(item, Failure):
                os._exit(1)
    except OSError:
        os._exit(0)
