"""A save on its way: what is known of it, for how long training has stood still for it, what becomes of it."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaroute.checkpoint.background import Background
from megaroute.checkpoint.layout import RunRecord
from megaroute.checkpoint.staging import Copy
from megaroute.checkpoint.writer import Written


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    path: Path
    seconds: float
    """From the call until it was complete."""
    stall_seconds: float
    """Of these, the ones in which training stood still."""
    bytes: int
    """Of all its files."""


@dataclass
class Pending:
    """A checkpoint that is being written."""

    record: RunRecord
    cursor: dict[str, Any] | None
    work: Path
    beside: bool
    """Whether training goes on meanwhile."""
    began: float
    writing: Background[Written]
    copy: Copy | None
    """What training must not overtake; None where it is waited for."""
    declaring: Background[int] | None = None
    """Begins when all ranks have written."""
    stall_seconds: float = 0.0
    """Until `halted`."""
    halted: float | None = None
    """Since when training stands still for it; None while it goes on."""

    def halt(self) -> None:
        """Training stands still from now on, if it does not yet."""
        if self.halted is None:
            self.halted = time.perf_counter()

    def go_on(self) -> None:
        """Training goes on."""
        assert self.halted is not None
        self.stall_seconds += time.perf_counter() - self.halted
        self.halted = None


@contextmanager
def removed_on_failure(work: Path) -> Iterator[None]:
    """What was written so far would fill the disk."""
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise
