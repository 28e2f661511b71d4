"""The loop: the life of a run on one screen."""

import math
import time

from megaroute.common.exit_codes import FINISHED, STOPPED
from megaroute.common.files import write_json
from megaroute.common.log import get_logger
from megaroute.platform.distributed import any_rank
from megaroute.training import rollback, tasks
from megaroute.training.evaluate import validate
from megaroute.training.observer import Observer
from megaroute.training.parts import Parts
from megaroute.training.setup import gather_cursor, run_record
from megaroute.training.signals import StopRequest
from megaroute.training.step import run_step
from megaroute.training.tasks import TaskScorer
from megaroute.training.trace import FILE_NAME, trace
from megaroute.training.watch import Watch

log = get_logger(__name__)


def run(
    parts: Parts, observer: Observer, stop: StopRequest | None = None, score_tasks: TaskScorer | None = None
) -> int:
    """Train until train.steps or a request to stop; returns the exit code, FINISHED or STOPPED.

    `stop` listens already, perhaps since long before; without one nothing can ask.
    `score_tasks` scores the tasks of the section `evaluate`, where there are any.
    """
    config, state, watch = parts.config, parts.state, Watch(parts, observer)
    stop = stop or StopRequest()
    if any_rank(stop.requested, parts.platform):
        return _stopped(observer, "asked to stop before the first step: nothing to save; the same command starts again")
    while state.step < config.train.steps:
        result = run_step(parts, stop.requested)
        length, padding = config.data.sequence_length, result.totals.padding
        state.advance(result.rows, length, result.nonfinite, spiked=bool(result.spikes), padding=padding)
        observer.train(result)
        _tell_saved(parts, observer, result.totals.saved)
        watch.step(result)
        if result.totals.stop:
            return _stop(parts, observer)
        if _validation_due(parts):
            parts.pulse.enter("validation")
            validation = validate(parts)
            watch.validation(validation)
            state.valid_loss = validation.loss if math.isfinite(validation.loss) else None
        if score_tasks is not None and tasks.due(parts):
            parts.pulse.enter("tasks")
            began = time.perf_counter()
            observer.tasks(score_tasks(parts), time.perf_counter() - began)
        if _pauses(parts, score_tasks) and any_rank(stop.requested, parts.platform):
            return _stop(parts, observer)
        if parts.checkpoints.due(state.step) and rollback.may_save(parts):
            _save(parts, observer, wait=not config.checkpoint.asynchronous)
    _save(parts, observer)
    parts.pulse.enter("report")
    if config.data.valid is not None and config.metrics.trace_samples:
        found = trace(parts, config.metrics.trace_samples)
        if found is not None:
            write_json(parts.run_dir / FILE_NAME, found)
    observer.event("end", f"finished {state.step:,} step{'s' if state.step != 1 else ''}")
    return FINISHED


def _validation_due(parts: Parts) -> bool:
    train, step = parts.config.train, parts.state.step
    every = train.validate_every
    return every is not None and (step % every == 0 or step == train.steps)


def _pauses(parts: Parts, score_tasks: TaskScorer | None) -> bool:
    """Whether something took its time after the step, in which a request to stop may have come."""
    return _validation_due(parts) or (score_tasks is not None and tasks.due(parts))


def _save(parts: Parts, observer: Observer, wait: bool = True) -> None:
    parts.pulse.enter("save")
    parts.checkpoints.drain()
    if parts.checkpoints.last != parts.state.step:  # else written at this very step already
        parts.checkpoints.save(run_record(parts), lambda: gather_cursor(parts), wait)
    _tell_saved(parts, observer)


def _tell_saved(parts: Parts, observer: Observer, advance: bool = False) -> None:
    for saved in parts.checkpoints.poll(advance):
        values = {"seconds": saved.seconds, "stall_seconds": saved.stall_seconds, "bytes": saved.bytes}
        text = (
            f"{saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, {saved.stall_seconds:.2f} s of them without a step"
        )
        observer.event("checkpoint", f"saved {saved.path}: {text}", values)


def _stop(parts: Parts, observer: Observer) -> int:
    if not rollback.may_save(parts):
        parts.checkpoints.drain()
        _tell_saved(parts, observer)
        last = parts.checkpoints.last or 0
        return _stopped(observer, f"asked to stop among bad steps, which are not saved: it goes on from step {last}")
    _save(parts, observer)
    step = parts.state.step
    return _stopped(observer, f"asked to stop: saved at step {step}; the same command goes on from there")


def _stopped(observer: Observer, message: str) -> int:
    observer.event("stop", message)
    return STOPPED
