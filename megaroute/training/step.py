"""One optimizer step."""

import math
import time
from dataclasses import dataclass

from megaroute.model.flops import TRAINING_FACTOR, dense_forward, executed_forward
from megaroute.training.batches import Micro, cut, sample_numbers
from megaroute.training.forward import run_schedule
from megaroute.training.parts import Parts
from megaroute.training.reduce import Totals, reduce_step


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks but for the time."""

    totals: Totals
    budget_loss: float
    grad_norm: float
    lr: float
    rows: int
    skipped: bool
    seconds: float
    executed_flops: float
    dense_flops: float
    micros: list[Micro]
    """This rank's micro-batches, with the routing records of its stage."""


def run_step(parts: Parts, stop: bool = False) -> StepResult:
    """Read, forward, backward, agree, update.  `stop` is this rank's wish to end; the step carries it to all ranks."""
    began = time.perf_counter()
    config, state, groups = parts.config, parts.state, parts.groups
    parts.batch_size.update(state.samples, consistency_check=True)
    micro_batches = parts.batch_size.get()
    rows = micro_batches * config.train.micro_batch
    batch = parts.stream.take(rows) if parts.stream is not None else None
    samples = sample_numbers(state.samples, rows, groups)
    assert batch is None or (batch.samples == samples).all(), "stream and step disagree on the rows of this replica"
    scale = float(parts.optimizer.get_loss_scale()) / micro_batches
    micros = cut(config, parts.platform, batch, samples, state.step, budget_scale=scale)

    lr = parts.schedule.set(state.step + 1)
    for chunk in parts.wrapped:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    reports = run_schedule(parts, micros, forward_only=False)
    totals = reduce_step(parts, micros, reports, stop)
    grad_norm, skipped = _update(parts, totals)
    parts.platform.synchronize()

    rows *= groups.dims.data
    length = config.data.sequence_length
    executed = executed_forward(config.model, rows, length, list(totals.rows), list(totals.pairs))
    return StepResult(
        totals=totals,
        budget_loss=_budget_loss(parts, totals),
        grad_norm=grad_norm,
        lr=lr,
        rows=rows,
        skipped=skipped,
        seconds=time.perf_counter() - began,
        executed_flops=float(TRAINING_FACTOR * executed),
        dense_flops=float(TRAINING_FACTOR * dense_forward(config.model, rows, length)),
        micros=micros,
    )


def _update(parts: Parts, totals: Totals) -> tuple[float, bool]:
    """Clip and update unless loss or gradient is not finite; every rank has the same numbers, so all decide alike."""
    overflow = parts.optimizer.prepare_grads()  # fp16: the loss scale was too large
    clip = parts.config.optim.clip_grad
    grad_norm = float(parts.optimizer.clip_grad_norm(clip) if clip > 0 else parts.optimizer.get_grad_norm())
    if overflow or not totals.finite or not math.isfinite(grad_norm):
        return grad_norm, True
    parts.optimizer.step_with_ready_grads()
    densities = dict(zip(parts.config.routed_layers, totals.density, strict=True))
    routing = parts.config.routing
    for unit, layer in parts.routed.items():
        layer.router.update(densities[unit], routing.density, routing.controller.gain)
    return grad_norm, False


def _budget_loss(parts: Parts, totals: Totals) -> float:
    """weight * sum over units of (r - P)^2, r of the global batch or of each micro-batch as routing.budget says."""
    routing = parts.config.routing
    if routing.budget.estimator == "microbatch":
        return routing.budget.weight * sum(totals.squared_gap)
    return routing.budget.weight * sum((density - routing.density) ** 2 for density in totals.density)
