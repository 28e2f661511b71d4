"""The one object that training tells what happened."""

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megaroute.config.root import Config
from megaroute.metrics.console import LogSink, ProgressSink
from megaroute.metrics.records import EventRecord, TasksRecord, TrainRecord, ValidRecord
from megaroute.metrics.run_view import mean_target
from megaroute.metrics.sinks import FILE_NAME, JsonlSink, NullSink, TensorBoardSink


class MetricsWriter:
    """Hands every record to `metrics.jsonl`, the log, a progress bar when standard error is a terminal, and TensorBoard
    when metrics.tensorboard is set.  Lives on rank 0 only, in `run_dir`, which exists.

    `start_step` is the number of steps completed before this attempt, `units` the labels of the routed units,
    `device_name` as `torch.cuda.get_device_name` gives it, or "cpu".  Raises ConfigError when TensorBoard is asked for
    and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Config,
        *,
        start_step: int,
        attempt: int,
        device_name: str,
        world_size: int,
        units: tuple[str, ...],
    ) -> None:
        self._about = {"device": device_name, "world_size": world_size, "units": list(units)}
        run_dir, steps, every = Path(run_dir), config.train.steps, config.metrics.log_every
        log = LogSink(
            every=every,
            start_step=start_step,
            steps=steps,
            units=units,
            target=lambda step: mean_target(config.routing, config.model.num_layers, step),
            device=device_name,
            precision=config.train.precision,
            devices=world_size,
        )
        # TensorBoard is opened first, since it may be refused, but told after the file that all else relies on.
        events = [TensorBoardSink(run_dir / "tensorboard", attempt, units, every)] if config.metrics.tensorboard else []
        self._sinks: list[NullSink] = [JsonlSink(run_dir / FILE_NAME), log, *events]
        if sys.stderr.isatty():
            self._sinks.append(ProgressSink(start_step=start_step, steps=steps))

    def train(self, record: TrainRecord) -> None:
        """Write one step."""
        for sink in self._sinks:
            sink.train(record)

    def valid(self, record: ValidRecord) -> None:
        """Write one validation."""
        for sink in self._sinks:
            sink.valid(record)

    def tasks(self, record: TasksRecord) -> None:
        """Write one scoring of tasks."""
        for sink in self._sinks:
            sink.tasks(record)

    def event(self, record: EventRecord) -> None:
        """Write one event, log its message; "start" and "resume" also get device, ranks and routed units."""
        if record.kind in ("start", "resume"):
            values: dict[str, Any] = {**self._about, **record.values}
            record = dataclasses.replace(record, values=values)
        for sink in self._sinks:
            sink.event(record)

    def close(self) -> None:
        """Close every sink, also when one of them fails to."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
