"""How far a long job is: a bar on a terminal, a log line every half minute elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from megaroute.common.log import get_logger

LOG_EVERY_S = 30.0


class Progress:
    """Counts bytes of text and finished parts; a context manager.  `shown` is False on all ranks but the first."""

    def __init__(self, parts: int, done: int = 0, shown: bool = True) -> None:
        self._parts, self._done, self._bytes = parts, done, 0
        self._logs = shown and not sys.stderr.isatty()
        self._next_log = time.monotonic() + LOG_EVERY_S
        self._bar = tqdm(unit="B", unit_scale=True, disable=None if shown else True, desc=self._state())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, text_bytes: int) -> None:
        """More text was read."""
        self._bytes += text_bytes
        self._bar.update(text_bytes)
        if self._logs and time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + LOG_EVERY_S
            get_logger(__name__).info("%s, %.0f MB of text", self._state(), self._bytes / 1e6)

    def part_done(self) -> None:
        """One more part is finished."""
        self._done += 1
        self._bar.set_description(self._state())

    def _state(self) -> str:
        return f"{self._done}/{self._parts} parts"
