"""What a person watching the run sees: a line per interval in the log, and a progress bar on a terminal."""

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megaroute.common.log import ROOT, get_logger
from megaroute.metrics.formats import duration, percent, si
from megaroute.metrics.load_text import density_text, load_texts
from megaroute.metrics.records import EventRecord, TaskScore, TasksRecord, TrainRecord, ValidRecord
from megaroute.metrics.sinks import NullSink
from megaroute.metrics.throughput import utilisation

LONG_WAIT = 0.01
"""Up to this share of the time waiting for data is not worth a word."""


@dataclass
class Interval:
    """Work, time and load since the last log line."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0
    wait: float = 0.0
    loads: list[TrainRecord] = field(default_factory=list)

    def add(self, record: TrainRecord) -> None:
        """Count one more step."""
        self.steps += 1
        self.seconds += record.seconds
        self.tokens += record.tokens_per_second * record.seconds
        self.flops += record.executed_flops
        self.dense_flops += record.dense_flops
        self.wait += record.data.get("wait_s", 0.0)
        self.loads.append(record)

    def per_second(self, amount: float) -> float:
        """`amount` over the time of the interval; 0 when no time passed."""
        return amount / self.seconds if self.seconds else 0.0


class LogSink(NullSink):
    """One log line per `every` steps, at the first step of an attempt and at the last of the run; one per event.

    Loss, gradient norm, learning rate and density are those of the step; speeds, overflow and load are means since the
    last line.  `target` gives the mean target density of a step, counted from 1, and None where there is none.
    """

    def __init__(
        self,
        *,
        every: int,
        start_step: int,
        steps: int,
        units: tuple[str, ...],
        target: Callable[[int], float | None],
        device: str,
        precision: str,
        devices: int,
    ) -> None:
        self._every = every
        self._start_step = start_step
        self._steps = steps
        self._units = units
        self._target = target
        self._device = device
        self._precision = precision
        self._devices = devices
        self._interval = Interval()
        self._log = get_logger(__name__)

    def train(self, record: TrainRecord) -> None:
        self._interval.add(record)
        if record.step % self._every == 0 or record.step in (self._start_step + 1, self._steps):
            self._log.info("%s", " | ".join(self._parts(record)))
            self._interval = Interval()

    def valid(self, record: ValidRecord) -> None:
        parts = [
            f"step {record.step}/{self._steps}",
            f"valid loss {record.loss:.4f}",
            f"{record.bits_per_byte:.4f} bits per byte",
            density_text(self._units, record.density, self._target(record.step), "validation density"),
            f"{record.rows} rows",
        ]
        self._log.info("%s", " | ".join(parts))

    def tasks(self, record: TasksRecord) -> None:
        told = [task_text(name, score) for name, score in record.scores.items()]
        self._log.info("%s", " | ".join([f"step {record.step}/{self._steps}", *told, duration(record.seconds)]))

    def event(self, record: EventRecord) -> None:
        if record.kind in ("alarm", "recovered"):
            level = logging.WARNING if record.kind == "alarm" else logging.INFO
            self._log.log(level, "step %d/%d | %s | %s", record.step, self._steps, record.kind, record.message)
        else:
            self._log.info("%s", record.message)

    def _parts(self, record: TrainRecord) -> list[str]:
        left = self._interval.seconds / self._interval.steps * (self._steps - record.step)
        parts = [
            f"step {record.step}/{self._steps}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3g}",
            *self._speed(),
            density_text(self._units, record.density, self._target(record.step)),
            *load_texts(self._units, self._interval.loads),
            *self._data(record),
            f"lr {record.lr:.2e}",
            f"eta {duration(left)}",
        ]
        for name, deviations in record.spikes.items():
            parts.append(f"{name} is {deviations:.0f} standard deviations high")
        if record.skipped_update and not record.nonfinite:
            parts.append("update skipped")
        elif record.skipped_update:
            parts.append(f"update skipped: loss or gradient not finite, {record.nonfinite} in a row")
        return parts

    def _data(self, record: TrainRecord) -> list[str]:
        """Shares of several sources, and a wait for data that is worth a word."""
        shares = record.data_shares
        parts = [", ".join(f"{name} {percent(share)}" for name, share in shares.items())] if len(shares) > 1 else []
        wait = self._interval.per_second(self._interval.wait)
        return [*parts, f"waiting for data {percent(wait)}"] if wait > LONG_WAIT else parts

    def _speed(self) -> list[str]:
        """Tokens, FLOP/s and, where the device is known, utilisation: executed, and as if nothing had been skipped."""
        interval = self._interval
        executed, dense = interval.per_second(interval.flops), interval.per_second(interval.dense_flops)
        parts = [
            f"{si(interval.per_second(interval.tokens))} tokens/s",
            _both(si(executed, "FLOP/s"), si(dense, "FLOP/s"), executed == dense),
        ]
        shares = [utilisation(rate, self._device, self._precision, self._devices) for rate in (executed, dense)]
        known = [percent(share) for share in shares if share is not None]
        return [*parts, f"MFU {_both(known[0], known[1], executed == dense)}"] if known else parts


def task_text(name: str, score: TaskScore) -> str:
    """`piqa acc_norm 61.0 ± 4.9 % of 100`."""
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{name} {score.metric} {100 * score.value:.1f}{error} % of {score.documents:,}"


def _both(executed: str, dense: str, alike: bool) -> str:
    return f"{executed} executed" if alike else f"{executed} executed, {dense} dense-equivalent"


class ProgressSink(NullSink):
    """A progress bar on standard error.  While it is open, the package's log lines are written above it."""

    def __init__(self, *, start_step: int, steps: int) -> None:
        self._open = ExitStack()
        self._open.enter_context(logging_redirect_tqdm(loggers=[logging.getLogger(ROOT)]))
        self._bar = self._open.enter_context(
            tqdm(total=steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr)
        )

    def train(self, record: TrainRecord) -> None:
        self._bar.set_postfix_str(f"loss {record.loss:.4f}, {si(record.tokens_per_second)} tokens/s", refresh=False)
        self._bar.update(record.step - self._bar.n)

    def close(self) -> None:
        self._open.close()
