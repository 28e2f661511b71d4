"""The trace that a rank leaves when it fails: the last words of `log.txt`, and an event in the metrics."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megaroute.common.errors import MegarouteError
from megaroute.metrics import sinks
from megaroute.metrics.history import read_history
from megaroute.metrics.records import EventRecord

LOG_NAME = "log.txt"


@contextmanager
def logged(run_dir: Path, rank: int) -> Iterator[None]:
    """Let an exception of the block write itself into `log.txt` on its way; any rank may be the first to fail."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # the exception itself is what matters
            _log(run_dir / LOG_NAME, rank, error)
        raise


@contextmanager
def recorded(run_dir: Path, rank: int) -> Iterator[None]:
    """The same for `metrics.jsonl`, once the attempt has begun: the report then says how it ended."""
    try:
        yield
    except Exception as error:
        with suppress(OSError, MegarouteError):
            _event(run_dir / sinks.FILE_NAME, rank, error)
        raise


def _log(path: Path, rank: int, error: Exception) -> None:
    """One sentence of what we refuse, the whole traceback of a fault."""
    text = f"{error}\n" if isinstance(error, MegarouteError) else "".join(traceback.format_exception(error))
    with open(path, "a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%H:%M:%S')} [rank {rank}] {text}")


def _event(path: Path, rank: int, error: Exception) -> None:
    history = read_history(path)
    attempt = max(history.attempts, default=1)
    steps = history.of_attempt(attempt)
    words = " ".join(str(error).split())
    name = "" if isinstance(error, MegarouteError) else f"{type(error).__name__}: "
    message = f"failed on rank {rank}: {name}{words[:300]}"
    record = EventRecord(kind="error", step=steps[-1].step if steps else 0, attempt=attempt, message=message)
    sink = sinks.JsonlSink(path)
    try:
        sink.event(record)
    finally:
        sink.close()
