"""Causal attention of every position, and of chosen query positions, by what suits the device.

Shapes: S sequence, B batch, H hidden, D head width, n query heads and G key-value heads of this tensor rank, R computed
rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megaroute.model.blocked_attention import blocked_attention, blocked_pairs
from megaroute.model.flex_attention import DTYPES, flex_chosen_attention, flex_pairs
from megaroute.routing.capacity import capacity_plan
from megaroute.routing.plan import Plan


def causal_attention(q_SBnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, starts_SB: Tensor | None = None) -> Tensor:
    """Causal attention of every position; query heads share key-value heads in order.  Returns [S, B, n * D].

    With `starts_SB`, int32, a position sees no key before its own start.
    """
    if starts_SB is not None:
        plan = every_row(q_SBnD.shape[0], q_SBnD.shape[1], q_SBnD.device)
        out_RH = chosen_attention(q_SBnD.transpose(0, 1).flatten(0, 1), k_SBGD, v_SBGD, plan, starts_SB)
        return out_RH.unflatten(0, (q_SBnD.shape[1], -1)).transpose(0, 1)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBnD, k_SBGD, v_SBGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)


def every_row(seq: int, batch: int, device: torch.device) -> Plan:
    """The plan that computes every token, sample by sample."""
    return capacity_plan(torch.ones(seq, batch, dtype=torch.bool, device=device), seq)


def chosen_attention(
    q_RnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, plan: Plan, starts_SB: Tensor | None = None
) -> Tensor:
    """Attention of chosen queries, sorted by sample and position, each to the keys up to its own position.

    With `starts_SB`, int32, a position sees no key before its own start.  Returns [R, n * D] in the same order.
    """
    if q_RnD.device.type == "cpu":
        per_sample = list(plan.per_sample)
        return blocked_attention(q_RnD, k_SBGD, v_SBGD, plan.positions_R, per_sample, starts_SB).flatten(1)
    if q_RnD.dtype in DTYPES:
        return flex_chosen_attention(q_RnD, k_SBGD, v_SBGD, plan, starts_SB)
    return masked_attention(q_RnD, k_SBGD, v_SBGD, plan, starts_SB)


def masked_attention(
    q_RnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, plan: Plan, starts_SB: Tensor | None = None
) -> Tensor:
    """The same by scaled_dot_product_attention under a dense mask: for precisions that FlexAttention does not take."""
    keys_S = torch.arange(k_SBGD.shape[0], device=q_RnD.device)
    outs, start = [], 0
    for sample, rows in enumerate(plan.per_sample):
        at_R1 = plan.positions_R[start : start + rows, None]
        visible = keys_S <= at_R1
        if starts_SB is not None:
            visible &= keys_S >= starts_SB[:, sample][at_R1]
        q, k, v = (t.transpose(0, 1)[None] for t in (q_RnD[start : start + rows], k_SBGD[:, sample], v_SBGD[:, sample]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1))
        start += rows
    return torch.cat(outs).flatten(1)


def attention_pairs(plan: Plan, seq: int, device: torch.device, starts_SB: Tensor | None = None) -> Tensor:
    """Query-key pairs, masked ones included, that `chosen_attention` computes on a device, in a precision of training.

    int64 scalar on that device, not read to the host.
    """
    if device.type == "cpu":
        return blocked_pairs(plan.positions_R, list(plan.per_sample), seq, starts_SB)
    return flex_pairs(plan, seq, starts_SB)
