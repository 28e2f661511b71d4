"""Capacity: at most so many rows per unit.  Tokens above it are skipped, lowest margin first.

A capacity is one of each sample, and of every chunk of it under sequence parallelism, so that neither the micro-batch
size nor the other samples change who overflows.  Two scopes.  `unit`: a fixed number of rows, always computed; shapes
are static and nothing is read back to the host.  `stage`: units of one pipeline stage share their rows through a Pool;
shapes vary, because with static shapes the rows that a unit leaves unused would be computed all the same and pooling
would save nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaroute.routing.plan import Plan, round_up

MULTIPLE = 16
"""Rows are a multiple of this, the tile of tensor cores in 16-bit precision, as far as there are tokens."""


def capacity_rows(factor: float, density: float, tokens: int) -> int:
    """Rows of a unit: factor * density * tokens, rounded up to a multiple of 16, at most `tokens`.

    Args:
        tokens: tokens that share the rows: those of a sample, or of a chunk of it.
    """
    wanted = math.ceil(round(factor * density * tokens, 6))  # 1.1 * 0.1 * 100 is a little above 11
    return round_up(max(wanted, 1), MULTIPLE, tokens)


def limit(keep_sB: Tensor, margin_sB: Tensor, rows: int | Tensor) -> Tensor:
    """Of each sample keep at most `rows` tokens, dropping the lowest margin first.

    Of equal margins the earlier position stays.  Static shapes, no host synchronisation.

    Args:
        keep_sB: bool [s, B], decisions for the sequence or for one chunk of it.
        margin_sB: float [s, B], finite where kept.
        rows: of every sample, or int64 [B], of each.

    Returns:
        bool [s, B].
    """
    if isinstance(rows, int) and rows >= keep_sB.shape[0]:
        return keep_sB
    # A stable sort leaves equal margins by position; skipped tokens come last.
    order_sB = margin_sB.where(keep_sB, -torch.inf).argsort(dim=0, descending=True, stable=True)
    if isinstance(rows, int):
        return torch.zeros_like(keep_sB).scatter_(0, order_sB[:rows], True) & keep_sB
    first_sB = torch.arange(keep_sB.shape[0], device=keep_sB.device)[:, None] < rows
    return torch.zeros_like(keep_sB).scatter_(0, order_sB, first_sB) & keep_sB


def capacity_plan(keep_SB: Tensor, rows: int, chunks: int = 1) -> Plan:
    """The plan that computes exactly `rows` tokens of every sample in every chunk, with static shapes.

    They are the kept tokens and, as filler, the earliest skipped ones, which see the fewest keys.  Filler is computed
    and thrown away.  Nothing is read back to the host.

    Args:
        keep_SB: bool [S, B], S a multiple of `chunks`, of which at most `rows` of a sample are set in any chunk.
        rows: 1 to S / chunks.
    """
    seq, batch = keep_SB.shape
    length = seq // chunks
    assert 1 <= rows <= length, f"{rows} rows of {length} tokens"
    keep_TBs = keep_SB.reshape(chunks, length, batch).transpose(1, 2)
    offsets_TBr = _chosen_offsets(keep_TBs, rows)
    valid_TBr = keep_TBs.gather(2, offsets_TBr)
    device = keep_SB.device
    starts_T11 = torch.arange(chunks, device=device)[:, None, None] * length
    positions_TBr = offsets_TBr + starts_T11
    samples_1B1 = torch.arange(batch, device=device)[:, None]
    return Plan(
        rows_R=(positions_TBr * batch + samples_1B1).flatten(),
        chunks=chunks,
        kept=None,
        valid_R=valid_TBr.flatten(),
        order_R=_sample_major(chunks, batch, rows, device),
        per_sample=(chunks * rows,) * batch,
        positions_R=positions_TBr.transpose(0, 1).flatten(),
        everything=rows == length,
    )


def _chosen_offsets(keep_TBs: Tensor, rows: int) -> Tensor:
    """Positions within the chunk of the rows to compute, ascending, int64 [T, B, rows]."""
    skip_TBs = ~keep_TBs
    filler_TB1 = rows - keep_TBs.sum(2, keepdim=True)
    chosen_TBs = keep_TBs | (skip_TBs & (skip_TBs.cumsum(2) <= filler_TB1))
    # Row i is where the count of chosen tokens reaches i + 1.
    wanted_r = torch.arange(1, rows + 1, device=keep_TBs.device)
    return torch.searchsorted(chosen_TBs.cumsum(2), wanted_r.expand(*keep_TBs.shape[:2], rows).contiguous())


def _sample_major(chunks: int, batch: int, rows: int, device: torch.device) -> Tensor | None:
    if chunks == 1:
        return None
    return torch.arange(chunks * batch * rows, device=device).view(chunks, batch, rows).transpose(0, 1).flatten()


@dataclass
class Pool:
    """Rows that the units of one pipeline stage share while they compute one micro-batch.

    Each unit brings its share for each sample, and for each chunk under sequence parallelism, and takes what it needs
    of that and of what earlier units left, in multiples of 16.  So the rows of a stage, padding included, never exceed
    the sum of the shares where the tokens of a chunk are a multiple of 16, and who overflows does not depend on the
    other samples.  Nothing is read back to the host.
    """

    unused_B: Tensor | None = None
    """int64 [B], rows that earlier units left of each sample."""

    def limit(self, keep_sB: Tensor, margin_sB: Tensor, share: int) -> Tensor:
        """The decisions of the next unit that there are rows for, see `limit`, with `share` rows of each sample."""
        tokens = keep_sB.shape[0]
        available_B = torch.full_like(keep_sB[0], share, dtype=torch.int64)
        if self.unused_B is not None:
            available_B += self.unused_B
        offered_B = torch.where(available_B >= tokens, tokens, available_B // MULTIPLE * MULTIPLE)
        kept_sB = limit(keep_sB, margin_sB, offered_B)
        taken_B = -(-kept_sB.sum(0) // MULTIPLE) * MULTIPLE
        self.unused_B = (available_B - taken_B).clamp(min=0)
        return kept_sB
