"""The gate of executed rows: what it does to their branch, and what gradient the router gets from it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """y = x + g * branch with g = 1 in the forward pass and the gradient of a probability in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_KH: Tensor, branch_KH: Tensor, probability_K: Tensor, curvature: float) -> Tensor:
        ctx.save_for_backward(branch_KH)
        ctx.curvature, ctx.dtype = curvature, probability_K.dtype
        return x_KH + branch_KH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_KH,) = grads
        slope_K = _inner(grad_KH, ctx.saved_tensors[0])
        if ctx.curvature:
            slope_K = _benefit(slope_K, ctx.curvature)
        return grad_KH, grad_KH, slope_K.to(ctx.dtype), None


class _Scaled(torch.autograd.Function):
    """gate * branch, with the gate's gradient in float32."""

    @staticmethod
    def forward(ctx: Any, branch_KH: Tensor, gate_K: Tensor) -> Tensor:
        ctx.save_for_backward(branch_KH, gate_K)
        return branch_KH * gate_K[:, None].to(branch_KH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_KH,) = grads
        branch_KH, gate_K = ctx.saved_tensors
        return grad_KH * gate_K[:, None].to(grad_KH.dtype), _inner(grad_KH, branch_KH).to(gate_K.dtype)


def _benefit(slope_K: Tensor, curvature: float) -> Tensor:
    """s - c * s^2 / 2, with s held within the vertices +-1 / c, beyond which the parabola says the opposite of s."""
    slope_K = slope_K.clamp(-1 / curvature, 1 / curvature)
    return slope_K - 0.5 * curvature * slope_K**2


def _inner(a_KH: Tensor, b_KH: Tensor) -> Tensor:
    """Inner products of rows, in float32 or wider: in 16 bits most digits of a sum over H are lost."""
    wide = torch.promote_types(a_KH.dtype, torch.float32)
    return (a_KH.to(wide) * b_KH.to(wide)).sum(-1)


def straight_through(x_KH: Tensor, branch_KH: Tensor, probability_K: Tensor, curvature: float = 0.0) -> Tensor:
    """The gate of executed rows: returns x + branch, and lets gradient reach the router.

    With y = x + g * branch and a hard g = 1, the straight-through estimator (Bengio et al. 2013) puts dg =
    d(probability): the router gets s = <dL/dy, branch> for each executed row, and nothing for skipped ones, whose
    branch does not exist.  The branch is given by itself, because in 16-bit precision y - x has lost most of its
    digits.

    s is the slope of the loss at g = 1, but a router chooses between g = 1 and g = 0, and L(1) - L(0) is about
    s - L'' / 2.  With `curvature` c > 0 the router gets s - c * s^2 / 2, where c * s^2 stands in for L'': the empirical
    Fisher information of the gate, as in Fisher pruning (Theis et al. 2018, arXiv 1801.05787, section 3.1).  Where
    training has brought the branch to its best size s is 0 on average, and only the second term tells tokens for which
    it matters from those for which it does not.  Slopes beyond 1 / c, one nat of a token's loss, count as 1 / c: no
    parabola holds that far, and the square of a few steep tokens would drown all other gradients.

    Args:
        x_KH: input of the kept rows.
        branch_KH: what the unit adds to them, Block(x) - x.
        probability_K: float32, softmax probability of executing.
        curvature: tokens that the loss is a mean of, over the factor that the loss is scaled with.  c * s^2 is then the
            square of the slope of the sum of all tokens' losses, scaled like the loss.  0: the slope alone.
    """
    return _StraightThrough.apply(x_KH, branch_KH, probability_K, curvature)


def scaled(branch_KH: Tensor, gate_K: Tensor) -> Tensor:
    """gate * branch, row by row."""
    return _Scaled.apply(branch_KH, gate_K)


@dataclass(frozen=True)
class Gate:
    """The gate of one unit and micro-batch, applied to all tokens of this rank or to some rows of them."""

    value_N: Tensor | None
    """float32 [N], of every token; None where decisions carry no gradient and branches are added as they are."""
    multiplies: bool = False
    """Whether branches are multiplied by it; otherwise it only carries a gradient."""
    curvature: float = 0.0
    """See straight_through."""

    def rows(self, rows_K: Tensor) -> "Gate":
        """That of some rows."""
        return self if self.value_N is None else Gate(self.value_N.index_select(0, rows_K), *self._how)

    @property
    def _how(self) -> tuple[bool, float]:
        return self.multiplies, self.curvature

    def __call__(self, x_NH: Tensor, branch_NH: Tensor) -> Tensor:
        """What becomes of executed tokens `x_NH`, to which their unit adds `branch_NH`."""
        if self.value_N is None:
            return x_NH + branch_NH
        if self.multiplies:
            return x_NH + scaled(branch_NH, self.value_N)
        return straight_through(x_NH, branch_NH, self.value_N, self.curvature)
