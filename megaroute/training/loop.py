"""The loop: the life of a run on one screen."""

import math

from megaroute.common.exit_codes import FINISHED, STOPPED
from megaroute.common.files import write_json
from megaroute.common.log import get_logger
from megaroute.training.evaluate import validate
from megaroute.training.guards import LoadGuard, Notice, check_nonfinite
from megaroute.training.observer import Observer
from megaroute.training.parts import Parts
from megaroute.training.setup import gather_cursor, run_record
from megaroute.training.signals import StopRequest
from megaroute.training.step import StepResult, run_step
from megaroute.training.trace import FILE_NAME, trace

log = get_logger(__name__)


def run(parts: Parts, observer: Observer) -> int:
    """Train until train.steps or a request to stop; returns the exit code, FINISHED or STOPPED."""
    config, state = parts.config, parts.state
    guard = LoadGuard(config)
    with StopRequest() as stop:
        while state.step < config.train.steps:
            result = run_step(parts, stop.requested)
            padding = result.totals.padding
            state.advance(result.rows, config.data.sequence_length, result.skipped, padding=padding)
            observer.train(result)
            _tell_saved(parts, observer)
            if result.skipped:
                observer.event("alarm", "the update was left out: loss or gradient is not finite")
            _tell(observer, guard.check(state.step - 1, result.totals.wanted, result.totals.dropped))
            check_nonfinite(state.nonfinite, config.train.max_nonfinite)
            if result.totals.supply.skipped:
                observer.event("alarm", _damage(parts, result))
                parts.ledger.check_budget(config.data.skip_budget)
            if result.totals.stop:
                return _stop(parts, observer)
            if _validation_due(parts):
                validation = validate(parts)
                observer.valid(validation)
                state.valid_loss = validation.loss if math.isfinite(validation.loss) else None
                _tell(observer, guard.check_validation(state.step - 1, validation.density))
            if parts.checkpoints.due(state.step):
                _save(parts, observer, wait=not config.checkpoint.asynchronous)
        _save(parts, observer)
        if config.data.valid is not None and config.metrics.trace_samples:
            found = trace(parts, config.metrics.trace_samples)
            if found is not None:
                write_json(parts.run_dir / FILE_NAME, found)
    observer.event("end", f"finished {state.step:,} step{'s' if state.step != 1 else ''}")
    return FINISHED


def _damage(parts: Parts, result: StepResult) -> str:
    return (
        f"{result.totals.supply.skipped} slices of text could not be read and were skipped in step {parts.state.step}, "
        f"{parts.ledger.skipped} so far of data.skip_budget {parts.config.data.skip_budget}; inspect_checkpoint --data "
        "says which"
    )


def _tell(observer: Observer, notices: list[Notice]) -> None:
    for notice in notices:
        observer.event("recovered" if notice.recovered else "alarm", notice.message, notice.values)


def _validation_due(parts: Parts) -> bool:
    train, step = parts.config.train, parts.state.step
    every = train.validate_every
    return every is not None and (step % every == 0 or step == train.steps)


def _save(parts: Parts, observer: Observer, wait: bool = True) -> None:
    parts.checkpoints.drain()
    if parts.checkpoints.last != parts.state.step:  # else written at this very step already
        parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait)
    _tell_saved(parts, observer)


def _tell_saved(parts: Parts, observer: Observer) -> None:
    for saved in parts.checkpoints.poll():
        values = {"seconds": saved.seconds, "stall_seconds": saved.stall_seconds, "bytes": saved.bytes}
        text = (
            f"{saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, {saved.stall_seconds:.2f} s of them without a step"
        )
        observer.event("checkpoint", f"saved {saved.path}: {text}", values)


def _stop(parts: Parts, observer: Observer) -> int:
    _save(parts, observer)
    observer.event("stop", f"asked to stop: saved at step {parts.state.step}; the same command goes on from there")
    return STOPPED
