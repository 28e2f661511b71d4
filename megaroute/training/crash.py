"""The trace that a rank leaves when it fails: the last words of `log.txt`, and an event in the metrics."""

import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megaroute.common.errors import MegarouteError
from megaroute.metrics import sinks
from megaroute.metrics.history import read_history
from megaroute.metrics.records import EventRecord
from megaroute.training.heartbeat import Board

LOG_NAME = "log.txt"

_LOST = re.compile(
    r"(connection (closed|reset|refused)|remote process exited|broken pipe|timed out waiting|NCCL \w+)[^.\n]*", re.I
)
"""What communication says when the process at the other end has gone."""


class PeerLost(MegarouteError):
    """Another rank has ended: this one fails with it, and knows no reason of its own."""


@contextmanager
def lost_peers(rank: int) -> Iterator[None]:
    """Turn what gloo or NCCL raise when another rank has gone into a sentence."""
    try:
        yield
    except RuntimeError as error:  # torch's errors of communication are
        said = _LOST.search(str(error))
        if said is None:
            raise
        raise PeerLost(
            f"rank {rank} lost its connection to another rank, which has ended or hangs ({said[0][:100]}); why, that "
            f"rank says in {LOG_NAME}, unless it was killed"
        ) from error


@contextmanager
def logged(run_dir: Path, rank: int) -> Iterator[None]:
    """Let an exception of the block write itself into `log.txt` on its way; any rank may be the first to fail."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):  # the exception itself is what matters
            _log(run_dir / LOG_NAME, rank, _text(error))
        raise


@contextmanager
def recorded(run_dir: Path, rank: int, board: Board | None = None) -> Iterator[None]:
    """The same for `metrics.jsonl`, once the attempt has begun: the report then says how it ended.

    In a run that hangs, as `board` knows, ranks lose each other while they end one by one; that is no reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PeerLost) and board is not None and board.hangs:
            raise
        name = "" if isinstance(error, MegarouteError) else f"{type(error).__name__}: "
        record(run_dir, f"failed on rank {rank}: {name}{' '.join(str(error).split())[:300]}")
        raise


def say(run_dir: Path, rank: int, sentence: str) -> None:
    """Last words of a rank whose main thread cannot speak: to standard error, and to `log.txt`.

    Without the logger, whose lock the main thread may hold.
    """
    with suppress(OSError):
        sys.stderr.write(f"megaroute: error: [rank {rank}] {sentence}\n")
        sys.stderr.flush()
    with suppress(OSError):
        _log(run_dir / LOG_NAME, rank, f"{sentence}\n")


def record(run_dir: Path, message: str, values: Mapping[str, Any] | None = None) -> None:
    """Write an event "error" of the newest attempt, if that can be done."""
    with suppress(OSError, MegarouteError):
        _event(run_dir / sinks.FILE_NAME, message, values or {})


def _text(error: Exception) -> str:
    """One sentence of what we refuse, the whole traceback of a fault."""
    return f"{error}\n" if isinstance(error, MegarouteError) else "".join(traceback.format_exception(error))


def _log(path: Path, rank: int, text: str) -> None:
    with open(path, "a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%H:%M:%S')} [rank {rank}] {text}")


def _event(path: Path, message: str, values: Mapping[str, Any]) -> None:
    history = read_history(path)
    attempt = max(history.attempts, default=1)
    steps = history.of_attempt(attempt)
    step = steps[-1].step if steps else 0
    sink = sinks.JsonlSink(path)
    try:
        sink.event(EventRecord(kind="error", step=step, attempt=attempt, message=message, values=values))
    finally:
        sink.close()
