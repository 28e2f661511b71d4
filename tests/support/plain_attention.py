"""Attention as one writes it on a blackboard, and plans to try others on."""

import torch
from torch import Tensor

from megaroute.routing.capacity import capacity_plan, limit
from megaroute.routing.plan import Plan, make_plan

CPU = torch.device("cpu")


def sorted_rows(plan: Plan) -> Tensor:
    """Rows of the flattened micro-batch in the order of attention: by sample, then by position."""
    return plan.rows_R if plan.order_R is None else plan.rows_R[plan.order_R]


def visible(seq: int, starts_SB: Tensor | None, batch: int) -> Tensor:
    """Whether query s of sample b sees key t of it, bool [S, B, S]."""
    keys = torch.arange(seq)
    seen_SBS = (keys <= keys[:, None])[:, None].expand(seq, batch, seq)
    return seen_SBS if starts_SB is None else seen_SBS & (keys >= starts_SB.cpu()[:, :, None])


def plain_attention(q_SBnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, starts_SB: Tensor | None = None) -> Tensor:
    """Masked softmax attention of every position, [S, B, n * D], one head after the other."""
    seq, batch, heads, width = q_SBnD.shape
    hidden_BSS = ~visible(seq, starts_SB, batch).transpose(0, 1).to(q_SBnD.device)
    outs = []
    for head in range(heads):
        shared = head * k_SBGD.shape[2] // heads
        scores_BSS = torch.einsum("sbd,tbd->bst", q_SBnD[:, :, head], k_SBGD[:, :, shared]) / width**0.5
        weights_BSS = scores_BSS.masked_fill(hidden_BSS, float("-inf")).softmax(-1)
        outs.append(torch.einsum("bst,tbd->sbd", weights_BSS, v_SBGD[:, :, shared]))
    return torch.cat(outs, -1)


def random_plan(kind: str, density: float, seq: int, batch: int, chunks: int = 1, device: torch.device = CPU) -> Plan:
    """An exact plan that keeps tokens with a probability, or a capacity plan of half of the tokens."""
    generator = torch.Generator().manual_seed(1)
    keep_SB = torch.rand(seq, batch, generator=generator) < density
    if kind == "exact":
        return make_plan(keep_SB.to(device), chunks)
    rows = seq // chunks // 2
    margin_SB = torch.rand(seq, batch, generator=generator)
    kept = [limit(k, m, rows) for k, m in zip(keep_SB.chunk(chunks), margin_SB.chunk(chunks), strict=True)]
    return capacity_plan(torch.cat(kept).to(device), rows, chunks)


def random_starts(seq: int, batch: int, documents: float = 10) -> Tensor:
    """Starts of documents at random positions, about so many a row, int32 [S, B]."""
    new_SB = torch.rand(seq, batch, generator=torch.Generator().manual_seed(2)) < documents / seq
    new_SB[0] = True
    return torch.where(new_SB, torch.arange(seq)[:, None], 0).cummax(0).values.int()
