"""Commands in a pipe whose reader has had enough end quietly."""

import os
import select
import signal
import sys
from collections.abc import Callable

CLOSED = 128 + signal.SIGPIPE
"""Exit status of a command whose reader went away, as a shell gives it."""


def quietly(run: Callable[[], int]) -> int:
    """What `run` returns; CLOSED, without a traceback, when nobody reads standard output any more."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # else the interpreter would find out, after its last chance to be quiet
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # another pipe, which is news
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
