"""RMSNorm for layer specs.

Shapes: H hidden, ... any leading dimensions, N their product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """y = x * w / rms(x) in few passes over memory, statistics in float32 at least.

    torch has a fused kernel on accelerators only; on a CPU its RMSNorm is a chain of element-wise operations whose
    backward pass reads and writes every token about twenty times, here seven.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x_NH = _upcast(x).reshape(-1, x.shape[-1])
        norm_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True)
        inverse_N1 = norm_N1.square().div(x.shape[-1]).add(eps).rsqrt()
        ctx.save_for_backward(x, weight_H, inverse_N1)
        return (x_NH * inverse_N1).mul_(_upcast(weight_H)).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_H, inverse_N1 = ctx.saved_tensors
        hidden = x.shape[-1]
        x_NH, grad_NH = (_upcast(t).reshape(-1, hidden) for t in (x, grads[0]))
        wide_H = _upcast(weight_H)
        product_NH = grad_NH * x_NH
        grad_weight_H = torch.mv(product_NH.t(), inverse_N1[:, 0])
        # dx = w * g / rms - x * <w * g, x> / (H * rms^3)
        pull_N1 = torch.mv(product_NH, wide_H)[:, None] * inverse_N1.pow(3).div_(-hidden)
        grad_x_NH = torch.mul(x_NH, pull_N1, out=product_NH).addcmul_(grad_NH * wide_H, inverse_N1)
        return grad_x_NH.to(x.dtype).view(x.shape), grad_weight_H.to(weight_H.dtype), None


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x [..., H] divided by its root mean square over H (`eps` added to the mean square), times `weight_H`."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight_H, eps)
    return F.rms_norm(x, (x.shape[-1],), weight_H, eps)


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight carries Megatron-core's mark for sequence parallelism.

    Megatron-core's own wrapper refuses sequence parallelism.  The mark makes `finalize_model_grads` sum this weight's
    gradients over the tensor ranks, each of which sees other tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self.eps)
