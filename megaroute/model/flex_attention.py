"""Attention of chosen queries on accelerators: torch's FlexAttention, which reads only blocks of keys that are seen.

Shapes as in attention.py, and N sequences of R rows and T keys each: the samples of a capacity plan, which have equally
many rows, or one sequence of all samples together for an exact plan.  Q blocks of rows, J blocks of keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megaroute.routing.plan import Plan

BLOCK = 128
"""Rows and keys of a block, the default of FlexAttention, whose kernels' tiles divide it."""

MIN_HEAD_SIZE = 16
"""Products of FlexAttention's kernels are no narrower; narrower heads are padded with zeros."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in: every precision of training."""


def flex_chosen_attention(
    q_RnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, plan: Plan, starts_SB: Tensor | None = None
) -> Tensor:
    """Attention of chosen queries, sorted by sample and position, each to the keys from its start to its own position.

    Nothing is read back to the host.  Compiled except on the CPU, where torch has no backward pass for it: once for
    capacity plans, whose shapes are fixed, once with symbolic sizes for exact ones.

    Returns:
        [R, n * D] in the same order.
    """
    first_NR, last_NR = sight(plan, k_SBGD.shape[0], starts_SB)
    sequences, width = first_NR.shape[0], q_RnD.shape[-1]
    q = q_RnD.unflatten(0, first_NR.shape).transpose(1, 2)
    k, v = (t.transpose(0, 1).reshape(sequences, -1, *t.shape[2:]).transpose(1, 2) for t in (k_SBGD, v_SBGD))
    if width < MIN_HEAD_SIZE:
        q, k, v = (F.pad(t, (0, MIN_HEAD_SIZE - width)) for t in (q, k, v))
    mask = block_mask(first_NR, last_NR, k.shape[2])
    alone = q.device.type != "cpu" and not torch.compiler.is_compiling()
    attend = compiled(fixed=plan.kept is None) if alone else attend_fixed
    out = attend(q, k, v, mask, 1 / math.sqrt(width))
    return out[..., :width].transpose(1, 2).flatten(2).flatten(0, 1)


def flex_pairs(plan: Plan, seq: int, starts_SB: Tensor | None = None) -> Tensor:
    """Query-key pairs of the blocks that `flex_chosen_attention` visits, a scalar on the plan's device."""
    first_NR, last_NR = sight(plan, seq, starts_SB)
    keys = seq * len(plan.per_sample) // first_NR.shape[0]
    partial_NQJ, full_NQJ = _blocks(first_NR, last_NR, keys)
    return (partial_NQJ | full_NQJ).sum() * BLOCK**2


def sight(plan: Plan, seq: int, starts_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """First and last key that each row sees, int32 [N, R]; both never fall along a sequence.

    In one sequence of all samples key t of sample b is number b * seq + t.
    """
    batch = len(plan.per_sample)
    rows_R = plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]
    last_R = plan.positions_R
    first_R = torch.zeros_like(last_R) if starts_SB is None else starts_SB.flatten()[rows_R]
    if plan.kept is None:
        sequences = batch
    else:
        sequences, before_R = 1, rows_R % batch * seq
        first_R, last_R = first_R + before_R, last_R + before_R
    return first_R.int().view(sequences, -1), last_R.int().view(sequences, -1)


def block_mask(first_NR: Tensor, last_NR: Tensor, keys: int) -> BlockMask:
    """The mask under which row r of sequence n sees the keys from first[n, r] to last[n, r].

    Made from the ends of each block of rows: as rows are sorted, they bound what all rows of the block see.
    """
    partial_NQJ, full_NQJ = _blocks(first_NR, last_NR, keys)

    def seen(sequence: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= first_NR[sequence, row]) & (key <= last_NR[sequence, row])

    return BlockMask.from_kv_blocks(
        *_listed(partial_NQJ),
        *_listed(full_NQJ),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(first_NR.shape[1], keys),
    )


def _blocks(first_NR: Tensor, last_NR: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Blocks of which some rows may see some keys, and blocks of which every row sees every key: bool [N, Q, J]."""
    rows, device = first_NR.shape[1], first_NR.device
    top_Q = torch.arange(0, rows, BLOCK, device=device)
    bottom_Q = (top_Q + BLOCK - 1).clamp(max=rows - 1)
    left_J = torch.arange(0, keys, BLOCK, device=device)
    right_J = left_J + BLOCK - 1
    visited_NQJ = (right_J >= first_NR[:, top_Q, None]) & (left_J <= last_NR[:, bottom_Q, None])
    full_NQJ = (left_J >= first_NR[:, bottom_Q, None]) & (right_J <= last_NR[:, top_Q, None])
    full_NQJ &= (top_Q + BLOCK <= rows)[:, None]  # rows past the end see nothing
    return visited_NQJ & ~full_NQJ, full_NQJ


def _listed(blocks_NQJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of rows has, int32 [N, 1, Q], and their numbers, first, int32 [N, 1, Q, J]."""
    order_NQJ = blocks_NQJ.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_NQJ.sum(-1, dtype=torch.int32)[:, None], order_NQJ.int()[:, None]


def attend_fixed(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """FlexAttention of [N, n, R, D] to [N, G, T, D]."""
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def attend_varying(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """The same.  What is compiled is kept with a function's code, so that sizes of two kinds want two functions."""
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compiled(fixed: bool, backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention compiled for sizes that hardly ever change, or for sizes that do at every call.

    It raises when torch gives up compiling ever new kinds of inputs (torch._dynamo.config.recompile_limit): what would
    run instead is uncompiled, has scores of all pairs in memory, and would be taken for the kernel.
    """
    if fixed:
        return torch.compile(attend_fixed, backend=backend, fullgraph=True)
    return torch.compile(attend_varying, backend=backend, fullgraph=True, dynamic=True)
