"""What a router remembers between steps, and how its weights start."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose buffers stay float32, whatever the precision of the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactBuffers":
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():  # a cast of the model to bf16 must not round these
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = buffer.to(device=moved.device, dtype=torch.float32)
        return self


class RouterState(ExactBuffers):
    """Memory of a binary router."""

    density: Tensor
    """Scalar: density of the previous step over the global batch, as the budget measures it."""
    bias: Tensor
    """Scalar: the controller's addition to the execute logit."""
    slope: Tensor
    """Scalar: what the controller adds to the bias in each step, against a steady drift."""

    def __init__(self) -> None:
        super().__init__()
        # A router without bias executes half of the tokens before it has learned anything.
        self.register_buffer("density", torch.tensor(0.5))
        self.register_buffer("bias", torch.tensor(0.0))
        self.register_buffer("slope", torch.tensor(0.0))


def initial_std(logit_std: float, hidden_size: int) -> float:
    """Standard deviation of router weights at which logit differences over inputs of unit RMS have `logit_std`.

    The difference of two independent rows has variance 2 * std^2, summed over `hidden_size` inputs of mean square 1.
    """
    return logit_std / (2.0 * hidden_size) ** 0.5
