"""A request to stop, from a signal, noticed at the next step.  Imports nothing heavy: it listens before torch loads."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from megaroute.common.exit_codes import STOPPED

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_AT_ONCE = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it listens, SIGINT, SIGTERM and SIGUSR1 set `requested` and do nothing else, however often they come.

    SIGUSR1 is blocked in every thread and in every process that is started meanwhile, and one thread waits for it: srun
    signals all processes of a step, and one with the default action, such as a writer of a checkpoint, would die.
    """

    def __init__(self, joined: bool = True) -> None:
        self.requested = False
        self.joined = joined
        """Whether the other ranks count on this one.  Before, SIGINT and SIGTERM end the process: nothing is lost."""
        self._before: dict[int, object] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._wait, name="stop signals", daemon=True)

    def listen(self) -> None:
        """From now on; call in the main thread, before other threads and processes start."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        self._thread.start()

    def ignore(self) -> None:
        """The process is about to end: what comes now must not change its exit code."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python's end restores the default of any other handler

    def close(self) -> None:
        """Put everything back as `listen` found it."""
        self._closing = True
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # first: a signal that still waits must find our handler
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self) -> None:
        while not self._closing:
            signal.sigwait({signal.SIGUSR1})
            self.requested |= not self._closing

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in _AT_ONCE and not self.joined:
            os._exit(STOPPED)  # imports half done: an exception would be anywhere
        self.requested = True
