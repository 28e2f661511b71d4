"""A run directory as the report sees it: what is there, and what is not."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaroute.common.errors import DataError
from megaroute.config.routing import RoutingConfig
from megaroute.metrics import sinks
from megaroute.metrics import trace as trace_file
from megaroute.metrics.history import History, read_history
from megaroute.metrics.records import EventRecord
from megaroute.metrics.trace import Trace

COMPUTE_EVERYTHING = ("highway", "moe")
"""Routers without a target density."""

QUIET_S, QUIET_STEPS = 300.0, 20.0
"""A run that records nothing for so many seconds and so many of its slowest recent steps is taken to be over."""

GREEDY = ("gumbel", "early_exit")
"""Routers whose decision in validation is that of training without the noise."""


def mean_target(routing: RoutingConfig, num_layers: int, step: int) -> float | None:
    """Mean target density of the units at a step, counted from 1; None where there is none."""
    targets = routing.targets(num_layers, step - 1)
    return sum(targets) / len(targets) if targets and routing.router not in COMPUTE_EVERYTHING else None


@dataclass(frozen=True)
class RunView:
    """The files of one run directory."""

    directory: Path
    history: History
    config: Mapping[str, Any]
    """The resolved configuration as plain YAML, not as a Config: a report of an older version's run must not fail."""
    trace: Trace | None
    gaps: list[str] = field(default_factory=list)
    """A sentence for each thing that is missing or could not be read."""
    age: float = 0.0
    """Seconds since metrics.jsonl last grew."""

    @classmethod
    def open(cls, run_dir: str | Path) -> "RunView":
        """Read a run directory, or that of a file in it.

        Raises DataError when it does not exist or has no metrics.jsonl; all else may be missing.
        """
        directory = Path(run_dir).parent if Path(run_dir).is_file() else Path(run_dir)
        if not directory.exists():
            raise DataError(f"{run_dir} does not exist, so nothing is known of the run; name the directory of a run")
        history = read_history(directory / sinks.FILE_NAME)
        gaps: list[str] = []
        if history.damaged:
            lines = ", ".join(map(str, history.damaged[:10])) + (", ..." if len(history.damaged) > 10 else "")
            gaps.append(
                f"Line {lines} of metrics.jsonl could not be read, as a killed run may leave it, and is left out."
            )
        config = _config(directory, gaps)
        trace = _trace(directory, gaps)
        run = cls(directory, history, config, trace, gaps, time.time() - (directory / sinks.FILE_NAME).stat().st_mtime)
        if not (directory / trace_file.FILE_NAME).exists() and (run.skips or not history.train):
            gaps.append(f"There is no {trace_file.FILE_NAME}, so single tokens are not shown: {run.why_no_trace}.")
        return run

    def setting(self, key: str) -> Any:
        """The value of a dotted configuration key; None when the configuration has no such key."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def number(self, key: str) -> Any:
        """The same, when it is a number; None when it is anything else."""
        value = self.setting(key)
        return value if isinstance(value, int | float) else None

    @property
    def name(self) -> str:
        """Name of the run; that of its directory when there is no configuration."""
        return str(self.setting("run.name") or self.directory.resolve().name)

    @property
    def router(self) -> str:
        """`routing.router`; that of the method when there is no configuration."""
        return str(self.setting("routing.router") or "gumbel")

    @property
    def validates_greedily(self) -> bool:
        """Whether validation is routed as training is, but for the noise."""
        return self.router in GREEDY

    @property
    def skips(self) -> bool:
        """Whether a token may pass a unit unchanged because its router says so."""
        return bool(self.units) and self.router not in COMPUTE_EVERYTHING

    @cached_property
    def about(self) -> dict[str, Any]:
        """What "start" and "resume" events tell of model and machine; the last word counts."""
        told: dict[str, Any] = {}
        for event in self.history.events:
            if event.kind in ("start", "resume"):
                told.update(event.values)
        return told

    @cached_property
    def units(self) -> tuple[str, ...]:
        """Labels of the routed units, one for each recorded density; earlier versions routed whole layers."""
        widths = [len(r.density) for r in self.history.train[-1:]] + [len(r.density) for r in self.history.valid[-1:]]
        told = self.about.get("units", self.about.get("routed_layers"))
        traced = [unit.label for unit in self.trace.units] if self.trace else None
        for known in (told, traced):
            if known is not None and all(width == len(known) for width in widths):
                return tuple(map(str, known))
        return tuple(map(str, range(widths[0] if widths else 0)))

    @cached_property
    def routing(self) -> RoutingConfig | None:
        """The section `routing`; None when this version does not understand it."""
        try:
            return RoutingConfig.model_validate(self.setting("routing"))
        except ValidationError:
            return None

    def targets(self, step: int | None = None) -> tuple[float | None, ...]:
        """Target density of each unit at a step, counted from 1, or in the end when `step` is None; None: no target."""
        routing, count = self.routing, len(self.units)
        if routing is not None and routing.router in COMPUTE_EVERYTHING:
            return (None,) * count
        if routing is not None and isinstance(self.num_layers, int):
            targets = routing.targets(self.num_layers, None if step is None else step - 1)
            if len(targets) == count:
                return targets
        return (self.target,) * count

    @property
    def target(self) -> float | None:
        """The one target density that the configuration names first."""
        target = self.number("routing.density")
        return target if target is not None or self.trace is None else self.trace.density_target

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, routed ones included."""
        layers = self.number("model.num_layers")
        return layers if layers is not None or self.trace is None else self.trace.num_layers

    @property
    def steps_planned(self) -> int | None:
        """Steps of the whole run."""
        return self.number("train.steps")

    @property
    def steps_done(self) -> int:
        """Steps completed by the last record."""
        return self.history.train[-1].step if self.history.train else 0

    @property
    def ending(self) -> EventRecord | None:
        """The event that ended the last attempt; None when it goes on or was killed."""
        return self.ending_of(self.history.attempts[-1]) if self.history.attempts else None

    def ending_of(self, attempt: int) -> EventRecord | None:
        """The event that ended an attempt: the first failure, which other ranks may have followed, or the last word."""
        events = [event for event in self.history.events if event.attempt == attempt]
        failed = next((event for event in events if event.kind == "error"), None)
        return failed or next((event for event in reversed(events) if event.kind in ("end", "stop")), None)

    @property
    def silent(self) -> bool:
        """Whether nothing was recorded for so long that the run, if it has not ended, must have been cut off."""
        slowest = max((r.seconds for r in self.history.train[-20:]), default=0.0)
        return self.age > max(QUIET_S, QUIET_STEPS * slowest)

    @property
    def why_no_trace(self) -> str:
        """Why there is no trace of tokens: a clause."""
        if self.config and self.setting("data.valid") is None:
            return "it needs validation data, data.valid"
        if self.number("metrics.trace_samples") == 0:
            return "metrics.trace_samples is 0"
        if self.ending is None or self.ending.kind != "end":
            return "it is written at the end of a run, to which this one has not come"
        return "it was not written, or removed"

    @property
    def why_no_validation(self) -> str:
        """Why there is no validation: a clause."""
        every = self.number("train.validate_every")
        if not self.config:
            return "its configuration is not known"
        if self.setting("data.valid") is None:
            return "data.valid is not given"
        if every is None:
            return "train.validate_every is not given"
        due = min(every, self.steps_planned or every)
        if self.steps_done < due:
            return f"the first is due after step {due:,}"
        return "none was recorded"


def _config(directory: Path, gaps: list[str]) -> Mapping[str, Any]:
    path = directory / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, Mapping):
            return config
        reason = "it does not hold sections"
    except FileNotFoundError:
        reason = "there is no such file"
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    gaps.append(f"config.yaml could not be read ({reason}): shape, layout and target of the run are not shown.")
    return {}


def _trace(directory: Path, gaps: list[str]) -> Trace | None:
    try:
        return trace_file.read_trace(directory / trace_file.FILE_NAME)
    except FileNotFoundError:
        pass  # the reason follows from the whole run, see why_no_trace
    except (OSError, ValueError) as error:
        gaps.append(f"{trace_file.FILE_NAME} could not be read: {error}.")
    return None
