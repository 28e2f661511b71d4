"""What a person watching the run sees: a line per interval in the log, and a progress bar on a terminal."""

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megaroute.common.log import ROOT, get_logger
from megaroute.metrics.formats import duration, percent, si
from megaroute.metrics.records import EventRecord, TrainRecord, ValidRecord
from megaroute.metrics.sinks import NullSink
from megaroute.metrics.throughput import utilisation

MOST_LAYERS_SHOWN = 8
"""Densities are shown layer by layer up to so many routed layers, and as mean and range above."""


@dataclass
class Interval:
    """Work and time since the last log line."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def add(self, record: TrainRecord) -> None:
        """Count one more step."""
        self.steps += 1
        self.seconds += record.seconds
        self.tokens += record.tokens_per_second * record.seconds
        self.flops += record.executed_flops

    def per_second(self, amount: float) -> float:
        """`amount` over the time of the interval; 0 when no time passed."""
        return amount / self.seconds if self.seconds else 0.0


def density_text(layers: tuple[int, ...], density: tuple[float, ...]) -> str:
    """Mean density and, of few layers each one, of many the range: "density 0.51 (L2 0.48, L3 0.54)"."""
    if not density:
        return "no routed layer"
    mean = sum(density) / len(density)
    if len(density) <= MOST_LAYERS_SHOWN:
        each = ", ".join(f"L{layer} {share:.2f}" for layer, share in zip(layers, density, strict=True))
    else:
        each = f"{min(density):.2f} to {max(density):.2f}"
    return f"density {mean:.3f} ({each})"


class LogSink(NullSink):
    """One log line per `every` steps, at the first step of an attempt and at the last of the run; one per event.

    Loss, gradient norm, learning rate and density are those of the step; speeds are means since the last line.
    """

    def __init__(
        self,
        *,
        every: int,
        start_step: int,
        steps: int,
        layers: tuple[int, ...],
        device: str,
        precision: str,
        devices: int,
    ) -> None:
        self._every = every
        self._start_step = start_step
        self._steps = steps
        self._layers = layers
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
        score = f"valid loss {record.loss:.4f} | {record.bits_per_byte:.4f} bits per byte"
        greedy = f"greedy {density_text(self._layers, record.density)}" if record.density else "no routed layer"
        self._log.info("step %d/%d | %s | %s | %d rows", record.step, self._steps, score, greedy, record.rows)

    def event(self, record: EventRecord) -> None:
        self._log.log(logging.WARNING if record.kind == "alarm" else logging.INFO, "%s", record.message)

    def _parts(self, record: TrainRecord) -> list[str]:
        left = self._interval.seconds / self._interval.steps * (self._steps - record.step)
        parts = [
            f"step {record.step}/{self._steps}",
            f"loss {record.loss:.4f}",
            f"grad norm {record.grad_norm:.3g}",
            *self._speed(),
            density_text(self._layers, record.density),
            f"lr {record.lr:.2e}",
            f"eta {duration(left)}",
        ]
        if record.skipped_update:
            parts.append(f"update skipped: loss or gradient not finite, {record.nonfinite} in a row")
        return parts

    def _speed(self) -> list[str]:
        interval = self._interval
        flops = interval.per_second(interval.flops)
        parts = [f"{si(interval.per_second(interval.tokens))} tokens/s", f"{flops / 1e12:.3g} TFLOP/s executed"]
        share = utilisation(flops, self._device, self._precision, self._devices)
        return parts if share is None else [*parts, f"MFU {percent(share)}"]


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
