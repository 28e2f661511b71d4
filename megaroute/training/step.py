"""One optimizer step."""

import math
import time
from dataclasses import dataclass

import torch

from megaroute.config.routing_checks import LEARNED_BINARY
from megaroute.model.flops import StepFlops, training_flops
from megaroute.routing.experts import ExpertRouter, balance_loss
from megaroute.training import desync
from megaroute.training.batches import Micro, cut, mean_targets, sample_numbers
from megaroute.training.forward import run_schedule
from megaroute.training.load import Load, load_of
from megaroute.training.parts import Parts
from megaroute.training.reduce import Totals, reduce_step
from megaroute.training.spikes import Spike, judge


@dataclass(frozen=True)
class StepResult:
    """What a step did; equal on all ranks but for the time."""

    totals: Totals
    budget_loss: float
    """What density budget, or load balance of experts, adds to the loss."""
    grad_norm: float
    lr: float
    rows: int
    skipped: bool
    """Whether the update was left out."""
    spikes: tuple[Spike, ...]
    """What stood out, of a finite step."""
    seconds: float
    flops: StepFlops
    load: Load
    micros: list[Micro]
    """This rank's micro-batches, with the routing records of its stage."""

    @property
    def nonfinite(self) -> bool:
        """Whether loss or gradient was not finite."""
        return self.skipped and not self.spikes

    @property
    def executed_flops(self) -> float:
        """Executed FLOPs, forward and backward."""
        return self.flops.executed

    @property
    def dense_flops(self) -> float:
        """FLOPs of the model in which every token executes every layer."""
        return self.flops.dense


def run_step(parts: Parts, stop: bool = False) -> StepResult:
    """Read, forward, backward, agree, update.  `stop` is this rank's wish to end; the step carries it to all ranks."""
    began = time.perf_counter()
    config, state, groups = parts.config, parts.state, parts.groups
    parts.batch_size.update(state.samples, consistency_check=True)
    micro_batches = parts.batch_size.get()
    parts.pulse.enter("read", state.step + 1)
    rows = micro_batches * config.train.micro_batch
    batch = parts.stream.take(rows) if parts.stream is not None else None
    samples = sample_numbers(state.samples, rows, groups)
    assert batch is None or (batch.samples == samples).all(), "stream and step disagree on the rows of this replica"
    scale = float(parts.optimizer.get_loss_scale()) / micro_batches
    mean = mean_targets(config, parts.platform, groups, batch)
    micros = cut(config, parts.platform, batch, samples, state.step, budget_scale=scale, mean_tokens=mean)

    parts.pulse.enter("forward and backward")
    lr = parts.schedule.set(state.step + 1)
    for chunk in parts.wrapped:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    reports = run_schedule(parts, micros, forward_only=False)
    parts.pulse.enter("sum over ranks")
    totals = reduce_step(parts, micros, reports, stop, batch)
    totals.supply.check(state.step + 1)
    parts.ledger.add(totals.supply.digest, totals.supply.tokens, totals.supply.skipped)
    if desync.due(parts):
        desync.check(parts, micros)
    parts.pulse.enter("update")
    grad_norm, skipped, spikes = _update(parts, totals)
    parts.platform.synchronize()
    parts.pulse.enter("done")

    return StepResult(
        totals=totals,
        budget_loss=_budget_loss(parts, totals),
        grad_norm=grad_norm,
        lr=lr,
        rows=rows * groups.dims.data,
        skipped=skipped,
        spikes=spikes,
        seconds=time.perf_counter() - began,
        flops=_flops(parts, totals),
        load=load_of(config, groups.dims, totals),
        micros=micros,
    )


def _flops(parts: Parts, totals: Totals) -> StepFlops:
    config, length = parts.config, parts.config.data.sequence_length
    work = totals.work(config.units)
    return training_flops(config.model, config.routing, totals.positions // length, length, work, totals.dense_pairs)


def _update(parts: Parts, totals: Totals) -> tuple[float, bool, tuple[Spike, ...]]:
    """Clip, and update unless loss or gradient is not finite, or a spike that is to be skipped.

    Every rank has the same numbers, so all decide alike.  Returns gradient norm, whether the update was left out, and
    spikes.
    """
    overflow = parts.optimizer.prepare_grads()  # fp16: the loss scale was too large
    clip = parts.config.optim.clip_grad
    grad_norm = float(parts.optimizer.clip_grad_norm(clip) if clip > 0 else parts.optimizer.get_grad_norm())
    if overflow or not totals.finite or not math.isfinite(grad_norm):
        return grad_norm, True, ()
    settings = parts.config.train.spike
    spikes = judge(settings, parts.state.guards, totals.loss, grad_norm)
    if spikes and settings.action == "skip":
        return grad_norm, True, spikes
    parts.checkpoints.let_update()
    parts.optimizer.step_with_ready_grads()
    _update_routers(parts, totals)
    return grad_norm, False, spikes


def _update_routers(parts: Parts, totals: Totals) -> None:
    for index, unit in enumerate(parts.config.units):
        router = parts.routers.get(unit)
        if isinstance(router, ExpertRouter):
            router.update(torch.tensor(totals.choices[index]))
        elif router is not None:
            router.update(totals.wanted[index], parts.state.step, totals.soft[index])


def _budget_loss(parts: Parts, totals: Totals) -> float:
    """What routing adds to the loss, 0 for routers without a budget.

    weight * sum over units of (r - P)^2, r of the global batch or of each micro-batch as routing.budget says; of
    mixtures of experts the balance loss.  r is what routers choose: a capacity must not hide from them that it is full.
    """
    routing = parts.config.routing
    if routing.router == "moe":
        return _balance_loss(totals, routing.moe.balance_weight)
    if routing.router not in LEARNED_BINARY or routing.force is not None:
        return 0.0
    if routing.budget.estimator == "microbatch":
        return routing.budget.weight * sum(totals.squared_gap)
    targets = routing.targets(parts.config.model.num_layers, parts.state.step)
    densities = totals.wanted if routing.budget.density == "hard" else totals.soft
    gaps = (density - target for density, target in zip(densities, targets, strict=True))
    return routing.budget.weight * sum(gap**2 for gap in gaps)


def _balance_loss(totals: Totals, weight: float) -> float:
    loss = 0.0
    for choices, probability in zip(totals.choices, totals.expert_probability, strict=True):
        share_E = torch.tensor(choices, dtype=torch.float64) / sum(choices)
        loss += float(balance_loss(share_E, torch.tensor(probability, dtype=torch.float64), weight))
    return loss
