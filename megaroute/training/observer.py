"""Tells the metrics what happened; on ranks other than 0 it tells nobody."""

from collections.abc import Mapping
from typing import Any

from megaroute.metrics.history import next_attempt
from megaroute.metrics.records import EventKind, EventRecord, TaskScore, TasksRecord, TrainRecord, ValidRecord
from megaroute.metrics.sinks import FILE_NAME
from megaroute.metrics.writer import MetricsWriter
from megaroute.training.evaluate import Validation
from megaroute.training.parts import Parts
from megaroute.training.step import StepResult


class Observer:
    """Turns results of steps into records, on rank 0."""

    def __init__(self, parts: Parts, num_parameters: int) -> None:
        self._parts = parts
        self._writer: MetricsWriter | None = None
        if parts.groups.rank != 0:
            return
        parts.state.attempt = next_attempt(parts.run_dir / FILE_NAME)
        self._writer = MetricsWriter(
            parts.run_dir,
            parts.config,
            start_step=parts.state.step,
            attempt=parts.state.attempt,
            device_name=parts.platform.name,
            world_size=parts.groups.dims.world_size,
            units=tuple(unit.label for unit in parts.config.units),
        )
        values = {"parameters": num_parameters, "layout": parts.groups.dims.describe()}
        if parts.resumed_from is None:
            self.event("start", f"{num_parameters:,} parameters on {values['layout']}", values)
        else:
            self.event("resume", f"resuming after step {parts.resumed_from} on {values['layout']}", values)

    def train(self, result: StepResult) -> None:
        """One step."""
        if self._writer is None:
            return
        state, totals, load = self._parts.state, result.totals, result.load
        ledger = self._parts.ledger
        self._writer.train(
            TrainRecord(
                step=state.step,
                attempt=state.attempt,
                samples=state.samples,
                tokens=state.tokens,
                loss=totals.loss,
                budget_loss=result.budget_loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                seconds=result.seconds,
                tokens_per_second=totals.tokens / result.seconds,
                executed_flops=result.executed_flops,
                dense_flops=result.dense_flops,
                density=totals.density,
                skipped_update=result.skipped,
                nonfinite=state.nonfinite,
                spikes={spike.name: spike.deviations for spike in result.spikes},
                batch=result.rows,
                flops=result.flops.parts,
                rows=totals.rows,
                overflow=totals.overflow,
                choices=totals.choices if any(totals.choices) else (),
                overflow_flops=result.flops.overflow,
                load=load.record(),
                data={
                    "digest": ledger.text,
                    "tokens": dict(ledger.tokens),
                    "skipped": ledger.skipped,
                    "wait_s": totals.supply.wait_s,
                    "padding": totals.padding / totals.positions,
                },
            )
        )

    def valid(self, result: Validation) -> None:
        """One validation."""
        if self._writer is not None:
            state = self._parts.state
            self._writer.valid(
                ValidRecord(
                    step=state.step,
                    attempt=state.attempt,
                    loss=result.loss,
                    bits_per_byte=result.bits_per_byte,
                    density=result.density,
                    rows=result.rows,
                    flops_per_token=result.flops_per_token,
                )
            )

    def tasks(self, scores: Mapping[str, TaskScore], seconds: float) -> None:
        """One scoring of tasks."""
        if self._writer is not None:
            state = self._parts.state
            self._writer.tasks(TasksRecord(step=state.step, attempt=state.attempt, scores=scores, seconds=seconds))

    def event(self, kind: EventKind, message: str, values: dict[str, Any] | None = None) -> None:
        """Something worth a line."""
        if self._writer is not None:
            state = self._parts.state
            self._writer.event(
                EventRecord(kind=kind, step=state.step, attempt=state.attempt, message=message, values=values or {})
            )

    def close(self) -> None:
        """Close files."""
        if self._writer is not None:
            self._writer.close()
