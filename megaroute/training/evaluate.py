"""Validation: loss in nats per token and bits per byte, greedy routing, always the same rows."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaroute.data.stream import open_stream
from megaroute.model.flops import executed_forward
from megaroute.training.batches import Micro, cut, mean_targets, sample_numbers
from megaroute.training.forward import run_schedule
from megaroute.training.parts import Parts
from megaroute.training.reduce import Totals, reduce_step


@dataclass(frozen=True)
class Validation:
    """Result of one validation, equal on all ranks."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    density: tuple[float, ...]
    """Share of tokens executed, per routed unit, as the router decides at inference."""
    rows: int
    flops_per_token: float
    """Executed FLOPs of the forward pass."""


@torch.no_grad()
def validate(parts: Parts) -> Validation:
    """Score the first train.validate_samples rows of the validation stream."""
    config, data = parts.config, parts.groups.dims.data
    micros, reports = score(parts, config.train.validate_samples // data)
    totals = reduce_step(parts, micros, reports)
    sums = torch.zeros(2, dtype=torch.float64)
    if parts.groups.is_last_stage and parts.groups.tensor_rank == 0:
        for micro, report in zip(micros, reports, strict=True):
            assert micro.labels_BS is not None
            sums[0] += micro.without_padding(report["losses"].double()).sum().cpu()
            sums[1] += int(parts.token_bytes[micro.without_padding(micro.labels_BS).cpu().numpy()].sum())
    sums = sums.to(parts.platform.device)
    dist.all_reduce(sums)
    nats, text_bytes = sums.tolist()
    bits_per_byte = nats / (math.log(2) * text_bytes)
    return Validation(totals.loss, bits_per_byte, totals.density, config.train.validate_samples, _flops(parts, totals))


def _flops(parts: Parts, totals: Totals) -> float:
    config, length = parts.config, parts.config.data.sequence_length
    rows, work = totals.positions // length, totals.work(config.units)
    executed = executed_forward(config.model, config.routing, rows, length, work, totals.dense_pairs)
    return sum(executed.values()) / totals.tokens


def score(parts: Parts, rows: int) -> tuple[list[Micro], list[dict[str, torch.Tensor]]]:
    """Forward pass over this replica's first `rows` validation rows, with greedy routing.

    Returns the micro-batches, whose routing records are filled, and on the last stage a report for each.
    """
    groups, config = parts.groups, parts.config
    batch = None
    if parts.reads_tokens:
        with open_stream(config.data, "valid", groups.data_rank, groups.dims.data) as stream:
            batch = stream.take(rows)
    mean = mean_targets(config, parts.platform, groups, batch)
    micros = cut(config, parts.platform, batch, sample_numbers(0, rows, groups), parts.state.step, mean_tokens=mean)
    for chunk in parts.wrapped:
        chunk.eval()
    reports = run_schedule(parts, micros, forward_only=True)
    for chunk in parts.wrapped:
        chunk.train()
    return micros, reports
