"""Gather the rows of a plan, and put what was computed for them back."""

from typing import Any

import torch
from torch import Tensor


def gather(x_SBH: Tensor, rows_R: Tensor) -> Tensor:
    """Rows of [S, B, H] as [R, H]."""
    return x_SBH.reshape(-1, x_SBH.shape[-1]).index_select(0, rows_R)


class _GatherAlong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_R)
        return gather(x_SBH, rows_R), x_SBH.view_as(x_SBH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_RH, grad_SBH = grads
        flat = grad_SBH.reshape(-1, grad_SBH.shape[-1])
        return flat.index_add(0, ctx.saved_tensors[0], grad_RH).view_as(grad_SBH), None


def gather_along(x_SBH: Tensor, rows_R: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [S, B, H] as [R, H], and `x_SBH` itself for its other uses.

    Gradients of the rows are then added to those of the other uses, without a tensor of zeros between.
    """
    x_RH, same_SBH = _GatherAlong.apply(x_SBH, rows_R)
    return x_RH, same_SBH


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, rows_R: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows_R)
        ctx.kept = kept
        return gather(x_SBH, rows_R), x_SBH.view_as(x_SBH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_RH, grad_SBH = grads
        rows_K, grad_KH = ctx.saved_tensors[0][: ctx.kept], grad_RH[: ctx.kept]
        flat = grad_SBH.reshape(-1, grad_SBH.shape[-1])
        return flat.index_copy(0, rows_K, grad_KH).view_as(grad_SBH), None, None


class _PutBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest_SBH: Tensor, rows_K: Tensor, y_KH: Tensor) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.dtype = y_KH.dtype
        flat = rest_SBH.reshape(-1, rest_SBH.shape[-1])
        return flat.index_copy(0, rows_K, y_KH.to(flat.dtype)).view_as(rest_SBH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, gather(grads[0], ctx.saved_tensors[0]).to(ctx.dtype)


def take(x_SBH: Tensor, rows_R: Tensor, kept: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of `x_SBH`, and the rest of it for `combine`, which puts something in their place.

    In the rest the taken rows have no meaning and no gradient: that of `x_SBH` is, row by row, either the gradient of
    the taken row or of the rest, and is written once instead of summed from two.

    Args:
        rows_R: int64 [R], rows of the flattened tokens.
        kept: that many, at the beginning, are distinct and will be put back; the others are padding, whose results are
            thrown away and must have no gradient.  None: all.

    Returns:
        ([R, H], [S, B, H]).
    """
    x_RH, rest_SBH = _Take.apply(x_SBH, rows_R, rows_R.numel() if kept is None else kept)
    return x_RH, rest_SBH


def combine(rest_SBH: Tensor, rows_K: Tensor, y_KH: Tensor) -> Tensor:
    """`rest_SBH`, from `take`, with `y_KH` as the rows taken; every other token passes untouched, bit for bit."""
    return _PutBack.apply(rest_SBH, rows_K, y_KH)


def combine_masked(x_SBH: Tensor, keep_SB: Tensor, y_SBH: Tensor) -> Tensor:
    """The same from a full [S, B, H] result: `y_SBH` where kept, `x_SBH` elsewhere."""
    return torch.where(keep_SB[..., None], y_SBH, x_SBH)
