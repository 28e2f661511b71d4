"""Rotary position embedding (Su et al. 2021), Megatron-core's non-interleaved convention.

Entry i of a head turns with entry i + D/2 by angle a_i: (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin).
Shapes: S sequence, B batch, G key-value heads, D head width, ... any; angles hold each a_i twice, as Megatron-core's
RotaryEmbedding returns them.
"""

from typing import Any

import torch
from torch import Tensor


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """x [..., D] turned, into `out`.  cos and sin, see `_cos_sin`, broadcast to the shape of x."""
    half = x.shape[-1] // 2
    if torch.compiler.is_compiling():  # takes no strided `out`, and fuses the copy
        out.copy_(x * cos)
    else:
        torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos of angles [..., D], and sin, negative for the first half of D."""
    sin = angles.sin()
    sin[..., : angles.shape[-1] // 2].neg_()
    return angles.cos().to(dtype), sin.to(dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _turn(x, *_cos_sin(angles, x.dtype), x.new_empty(x.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        cos, sin = _cos_sin(ctx.saved_tensors[0], grads[0].dtype)
        return _turn(grads[0], cos, -sin, grads[0].new_empty(grads[0].shape)), None


class _RotateKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_SBGE: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(angles)
        k, v = kv_SBGE.chunk(2, -1)
        return _turn(k, *_cos_sin(angles, k.dtype), k.new_empty(k.shape)), v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_k, grad_v = grads
        cos, sin = _cos_sin(ctx.saved_tensors[0], grad_k.dtype)
        grad = grad_k.new_empty(*grad_k.shape[:-1], 2 * grad_k.shape[-1])
        into_k, into_v = grad.chunk(2, -1)
        _turn(grad_k, cos, -sin, into_k)
        into_v.copy_(grad_v)
        return grad, None


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., D] turned by `angles`, float32, which broadcast to the shape of x."""
    return _Rotate.apply(x, angles)


def rotate_keys(kv_SBGE: Tensor, angles_S11D: Tensor) -> tuple[Tensor, Tensor]:
    """Keys turned, and values as they are, from [S, B, G, 2 * D] with the key of each head before its value.

    Their gradients are written side by side, instead of being added to zeros apart.
    """
    k, v = _RotateKeys.apply(kv_SBGE, angles_S11D)
    return k, v
