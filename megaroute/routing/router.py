"""The binary router: two logits per token, execute or skip."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaroute.routing.budget import corrected_bias


class RouterState(nn.Module):
    """What a router remembers between steps, in float32 whatever the precision of the model."""

    density: Tensor
    """Scalar: share of tokens executed in the previous step, over the global batch."""
    bias: Tensor
    """Scalar: the controller's addition to the execute logit."""

    def __init__(self) -> None:
        super().__init__()
        # A router without bias executes half of the tokens before it has learned anything.
        self.register_buffer("density", torch.tensor(0.5))
        self.register_buffer("bias", torch.tensor(0.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RouterState":
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():  # a cast of the model to bf16 must not round these
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(device=moved.device, dtype=torch.float32)
        return self


class BinaryRouter(nn.Module):
    """Linear map from the normed input of a unit to the logits (skip, execute), without bias, in float32."""

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, hidden_size, dtype=dtype))
        self.state = RouterState()

    def forward(self, h_SBH: Tensor) -> Tensor:
        """logit_execute - logit_skip, float32 [S, B]; a token is executed when this (plus noise in training) is > 0."""
        weight_H = self.weight[1].float() - self.weight[0].float()
        return F.linear(h_SBH.float(), weight_H[None])[..., 0] + self.state.bias

    @torch.no_grad()
    def update(self, density: float, target: float, gain: float) -> None:
        """After a step: remember the global density and let the controller correct the bias."""
        self.state.density.fill_(density)
        self.state.bias.copy_(corrected_bias(self.state.bias, self.state.density, target, gain))


def initial_std(logit_std: float, hidden_size: int) -> float:
    """Standard deviation of router weights at which logit differences over inputs of unit RMS have `logit_std`.

    The difference of two independent rows has variance 2 * std^2, summed over `hidden_size` inputs of mean square 1.
    """
    return logit_std / (2.0 * hidden_size) ** 0.5
