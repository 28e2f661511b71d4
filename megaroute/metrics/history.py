"""Reading `metrics.jsonl` back: the run as one series of steps, whatever number of attempts it took."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from megaroute.common.errors import DataError
from megaroute.metrics.records import EventRecord, Record, TasksRecord, TrainRecord, ValidRecord, from_json

_Numbered = TypeVar("_Numbered", TrainRecord, ValidRecord, TasksRecord)

COMPARED = ("loss", "budget_loss", "grad_norm", "density")
"""Fields that a resumed run must reproduce; the others hold times or follow from the step."""


@dataclass(frozen=True)
class History:
    """Every record of a run, in the order of the file."""

    records: tuple[Record, ...]
    damaged: tuple[int, ...] = ()
    """Numbers, from 1, of whole lines that could not be read; a torn last line is not counted, it may still grow."""

    @cached_property
    def train(self) -> tuple[TrainRecord, ...]:
        """The run's steps, ascending; of a step that several attempts computed, the last attempt's."""
        last = {r.step: r for r in self._by_attempt(TrainRecord)}
        return tuple(last[step] for step in sorted(last))

    @cached_property
    def valid(self) -> tuple[ValidRecord, ...]:
        """The run's validations, ascending; the last attempt's of each step."""
        last = {r.step: r for r in self._by_attempt(ValidRecord)}
        return tuple(last[step] for step in sorted(last))

    @cached_property
    def tasks(self) -> tuple[TasksRecord, ...]:
        """The run's scores of tasks, ascending; the last attempt's of each step."""
        last = {r.step: r for r in self._by_attempt(TasksRecord)}
        return tuple(last[step] for step in sorted(last))

    @cached_property
    def events(self) -> tuple[EventRecord, ...]:
        """Every event, in the order of the file."""
        return tuple(r for r in self.records if isinstance(r, EventRecord))

    @cached_property
    def attempts(self) -> tuple[int, ...]:
        """Numbers of the attempts that wrote something, ascending."""
        return tuple(sorted({r.attempt for r in self.records}))

    def of_attempt(self, attempt: int) -> tuple[TrainRecord, ...]:
        """The steps that one attempt computed, superseded ones included."""
        return tuple(r for r in self.records if isinstance(r, TrainRecord) and r.attempt == attempt)

    def _by_attempt(self, cls: type[_Numbered]) -> list[_Numbered]:
        return sorted((r for r in self.records if isinstance(r, cls)), key=lambda r: r.attempt)


def read_history(path: str | Path) -> History:
    """The history of a `metrics.jsonl`, also of one that is being written or was cut off in the middle of a line.

    Raises DataError when there is no such file.
    """
    try:
        *lines, tail = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}), so nothing is known of the run; name the directory of a run"
        ) from error
    records: list[Record] = []
    damaged = []
    for number, line in enumerate([*lines, tail], start=1):
        try:
            record = from_json(line.decode()) if line.strip() else None
        except ValueError:
            damaged.append(number)
            continue
        if record is not None:
            records.append(record)
    return History(tuple(records), tuple(n for n in damaged if n <= len(lines)))


def next_attempt(path: str | Path) -> int:
    """Number of the attempt that will write to a `metrics.jsonl` next; the first is 1."""
    attempts = read_history(path).attempts if Path(path).exists() else ()
    return max(attempts, default=0) + 1


def overlap(history: History) -> list[tuple[int, TrainRecord, TrainRecord]]:
    """(step, earlier record, later record) for every step that two attempts both computed, ascending.

    A step that three attempts computed gives two pairs, each of consecutive attempts.
    """
    by_step: dict[int, dict[int, TrainRecord]] = {}
    for record in history.records:
        if isinstance(record, TrainRecord):
            by_step.setdefault(record.step, {})[record.attempt] = record
    pairs = []
    for step in sorted(by_step):
        of_step = [by_step[step][attempt] for attempt in sorted(by_step[step])]
        pairs += [(step, earlier, later) for earlier, later in pairwise(of_step)]
    return pairs


def differences(a: TrainRecord, b: TrainRecord) -> tuple[str, ...]:
    """Names of the fields in COMPARED whose bits differ between two records of a step, NaN being equal to NaN, and
    "data" when they have read other rows."""
    found = [name for name in COMPARED if not _same(getattr(a, name), getattr(b, name))]
    if "digest" in a.data and "digest" in b.data and a.data["digest"] != b.data["digest"]:
        found.append("data")
    return tuple(found)


def _same(a: float | Sequence[float], b: float | Sequence[float]) -> bool:
    if isinstance(a, Sequence) or isinstance(b, Sequence):
        return isinstance(a, Sequence) and isinstance(b, Sequence) and len(a) == len(b) and all(map(_same, a, b))
    return a == b or (math.isnan(a) and math.isnan(b))
