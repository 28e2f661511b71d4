"""Work that may go on beside training, and the one sentence that its failure becomes."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch.distributed as dist

from megaroute.common.errors import CheckpointWriteError, MegarouteError
from megaroute.common.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")


class Background(Generic[T]):
    """One call that begins now, in a thread, or ends now, without; its result or error waits for who asks.

    `what` is being written, for the sentence.
    """

    def __init__(self, work: Callable[[], T], what: str, in_thread: bool) -> None:
        self._work, self._what = work, what
        self._result: T | None = None
        self._error: MegarouteError | None = None
        self._thread: threading.Thread | None = None
        if in_thread:
            self._thread = threading.Thread(target=self._run, name="checkpoint writer")
            self._thread.start()
        else:
            self._run()

    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return self._thread is None or not self._thread.is_alive()

    def result(self) -> T:
        """Wait, and return what the call returned.  Raises CheckpointWriteError when it failed."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run(self) -> None:
        try:
            with writing(self._what):
                self._result = self._work()
        except MegarouteError as error:
            self._error = error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn whatever goes wrong within into a CheckpointWriteError that says on which rank and host."""
    try:
        yield
    except MegarouteError:
        raise
    except Exception as error:  # no space, no memory, a file system that went away
        if not isinstance(error, OSError):
            log.exception("%s", what)  # may be a fault of the program
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CheckpointWriteError(
            f"the {what} could not be written (rank {dist.get_rank()} on {socket.gethostname()}: {reason}); the older "
            "checkpoints are untouched, and the same command goes on from the newest of them once this is mended"
        ) from error
