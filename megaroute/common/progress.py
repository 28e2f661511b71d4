"""How far a long job is: a bar on a terminal, a log line every half minute elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from megaroute.common.log import get_logger

LOG_EVERY_S = 30.0

log = get_logger(__name__)


class Progress:
    """Counts what is done, in `unit`s; a context manager.

    `shown` is False on all ranks but the first; `total` is None where nobody knows it.  The bar of "B", bytes of text,
    has prefixes.
    """

    def __init__(self, state: str, unit: str, total: int | None = None, shown: bool = True) -> None:
        self._state, self._unit, self._total, self._count = state, unit, total, 0
        self._logs = shown and not sys.stderr.isatty()
        self._next_log = time.monotonic() + LOG_EVERY_S
        hidden = None if shown else True  # None: where there is no terminal
        self._bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", disable=hidden, desc=state, leave=unit == "B")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        self._bar.update(count)
        if self._logs and time.monotonic() >= self._next_log:
            self._next_log = time.monotonic() + LOG_EVERY_S
            log.info("%s, %s", self._state, self._done())

    def describe(self, state: str) -> None:
        """What is being done, from now on."""
        self._state = state
        self._bar.set_description(state)

    def _done(self) -> str:
        if self._unit == "B":
            return f"{self._count / 1e6:.0f} MB of text"
        return f"{self._count:,}{'' if self._total is None else f' of {self._total:,}'} {self._unit}s"
