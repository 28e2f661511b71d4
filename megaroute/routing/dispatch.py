"""Gather the rows of a plan, and put what was computed for them back."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """y = x + g * (out - x) with g = 1 in the forward pass and the gradient of a probability in the backward pass."""

    @staticmethod
    def forward(ctx: Any, out_KH: Tensor, x_KH: Tensor, probability_K: Tensor) -> Tensor:
        ctx.save_for_backward(out_KH, x_KH)
        ctx.probability_dtype = probability_K.dtype
        return out_KH.view_as(out_KH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        (grad_KH,) = grads
        out_KH, x_KH = ctx.saved_tensors
        delta_KH = out_KH.float() - x_KH.float()
        return grad_KH, None, (grad_KH.float() * delta_KH).sum(-1).to(ctx.probability_dtype)


def straight_through(out_KH: Tensor, x_KH: Tensor, probability_K: Tensor) -> Tensor:
    """The gate of executed rows: returns `out_KH`, bit for bit, and lets gradient reach the router.

    With y = x + g * (Block(x) - x) and a hard g = 1, dy/dx = dBlock/dx, and the straight-through estimator (Bengio et
    al. 2013) puts dg = d(probability): the router gets <dL/dy, Block(x) - x> for each executed row, and nothing for
    skipped ones, whose Block(x) does not exist.

    Args:
        out_KH: Block(x) of the kept rows.
        x_KH: input of the same rows.
        probability_K: float32, softmax probability of executing.
    """
    return _StraightThrough.apply(out_KH, x_KH, probability_K)


def gather(x_SBH: Tensor, rows_R: Tensor) -> Tensor:
    """Rows of [S, B, H] as [R, H]."""
    return x_SBH.reshape(-1, x_SBH.shape[-1]).index_select(0, rows_R)


def combine(x_SBH: Tensor, rows_K: Tensor, y_KH: Tensor) -> Tensor:
    """`x_SBH` with the rows `rows_K` replaced by `y_KH`; every other token passes untouched, bit for bit."""
    flat = x_SBH.reshape(-1, x_SBH.shape[-1])
    return flat.index_copy(0, rows_K, y_KH.to(flat.dtype)).view_as(x_SBH)


def combine_masked(x_SBH: Tensor, keep_SB: Tensor, y_SBH: Tensor) -> Tensor:
    """The same from a full [S, B, H] result: `y_SBH` where kept, `x_SBH` elsewhere."""
    return torch.where(keep_SB[..., None], y_SBH, x_SBH)
