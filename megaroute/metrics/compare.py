"""Several runs side by side: the words and numbers of the comparison."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaroute.metrics import alarms, summary
from megaroute.metrics.cautions import executed_in_validation
from megaroute.metrics.formats import percent, si
from megaroute.metrics.routing_view import UNRECORDED
from megaroute.metrics.run_view import RunView
from megaroute.model.flops import TRAINING_FACTOR


@dataclass(frozen=True)
class Comparison:
    """Runs under names that tell them apart."""

    runs: tuple[RunView, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[RunView]) -> "Comparison":
        """Runs that have the same name are told apart by their directories."""
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            folders = [str(run.directory.resolve()) for run in runs]
            common = os.path.commonpath(folders)
            names = [f"{name} ({os.path.relpath(at, common)})" for name, at in zip(names, folders, strict=True)]
        return cls(tuple(runs), tuple(names))

    @property
    def named(self) -> dict[str, RunView]:
        """The runs by their names."""
        return dict(zip(self.names, self.runs, strict=True))


@dataclass(frozen=True)
class Line:
    """One row of the table: a property, and its value in each run."""

    label: str
    values: tuple[str, ...]


def table(comparison: Comparison) -> list[Line]:
    """What was run and what came out; a property that no run has is left out."""
    runs = comparison.runs
    first = next((bits for run in runs if (bits := _bits(run)) is not None), None)
    columns: dict[str, Callable[[RunView], str]] = {
        **{fact: _fact_of(summary.shape, fact) for fact in ("Model", "Routing", "Layout", "Batch")},
        "Steps": lambda run: f"{run.steps_done:,}",
        "Tokens": lambda run: si(run.history.train[-1].tokens) if run.history.train else "",
        "Executed FLOPs": lambda run: si(executed_flops(run), "FLOP") if run.history.train else "",
        "Executed FLOPs per token": _per_token,
        "Executed arithmetic": _fact_of(summary.results, "Arithmetic executed"),
        "Training loss": _fact_of(summary.results, "Training loss"),
        "Validation": lambda run: _validation(run, first),
        "Density": _fact_of(summary.results, "Density"),
        "Validation density": _validation_density,
        "Validation FLOPs per token": _validation_flops,
        "Overflow": _overflow,
        "Load, maximum over mean": _load,
        "Speed": _fact_of(summary.results, "Speed"),
        "FLOP/s": _rate,
        "Utilisation": _fact_of(summary.results, "Utilisation"),
        "Alarms": lambda run: alarms.count(run.history),
        "Updates left out": lambda run: str(sum(r.skipped_update for r in run.history.train)),
    }
    lines = [Line(label, tuple(value(run) for run in runs)) for label, value in columns.items()]
    return [line for line in lines if any(line.values)]


def _fact_of(facts: Callable[[RunView], list[summary.Fact]], label: str) -> Callable[[RunView], str]:
    return lambda run: next((fact.value for fact in facts(run) if fact.label == label), "")


def executed_flops(run: RunView) -> float:
    """All FLOPs that the run has executed."""
    return sum(r.executed_flops for r in run.history.train)


def _per_token(run: RunView) -> str:
    tokens = sum(r.step_tokens for r in run.history.train)
    return si(executed_flops(run) / tokens, "FLOP") if tokens else ""


def _bits(run: RunView) -> float | None:
    return run.history.valid[-1].bits_per_byte if run.history.valid else None


def _validation(run: RunView, first: float | None) -> str:
    mine = _bits(run)
    if mine is None:
        return ""
    difference = "" if first is None or mine == first else f" ({mine - first:+.4f})"
    return f"{mine:.4f} bits per byte{difference}"


def _validation_density(run: RunView) -> str:
    share = executed_in_validation(run)
    return "" if share is None else percent(share)


def _validation_flops(run: RunView) -> str:
    """Of the forward pass, and against the forward passes of training, a third of its FLOPs."""
    last = run.history.valid[-1:]
    if not last or not last[0].flops_per_token:
        return UNRECORDED if last else ""
    train = summary.final(run.history.train)
    tokens = sum(r.step_tokens for r in train)
    forward = sum(r.executed_flops for r in train) / (TRAINING_FACTOR * tokens) if tokens else 0.0
    against = f", {percent(last[0].flops_per_token / forward)} of training's" if forward else ""
    return f"{si(last[0].flops_per_token, 'FLOP')} forward{against}"


def _overflow(run: RunView) -> str:
    counted = [r for r in run.history.train if r.rows]
    if not counted:
        return UNRECORDED if run.units else ""
    return f"{percent(sum(r.overflow_share for r in counted) / len(counted))} of what routers wanted"


def _load(run: RunView) -> str:
    loads = [r.load["ranks"] for r in summary.final(run.history.train) if "ranks" in r.load]
    return f"{sum(loads) / len(loads):.3f}" if loads else UNRECORDED


def _rate(run: RunView) -> str:
    last = summary.final(run.history.train)
    seconds = sum(r.seconds for r in last)
    if not seconds:
        return ""
    executed, dense = sum(r.executed_flops for r in last) / seconds, sum(r.dense_flops for r in last) / seconds
    return f"{si(executed, 'FLOP/s')} executed, {si(dense, 'FLOP/s')} dense-equivalent"
