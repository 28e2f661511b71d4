"""What every router is: a decision per token, and what gradient flows through it.

s is this tensor rank's slice of the sequence under sequence parallelism, else s = S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.context import RoutingContext
from megaroute.routing.modes import forced_decisions
from megaroute.routing.noise import logistic, uniform


@dataclass(frozen=True)
class Place:
    """Which slice of the sequence this rank routes."""

    chunk: int = 0
    chunks: int = 1
    whole: Callable[[Tensor], Tensor] = lambda slice_sB: slice_sB
    """Slices [s, B] of all tensor ranks, put together: [S, B]; no gradient."""

    def slice(self, x_SB: Tensor) -> Tensor:
        """This rank's slice of a tensor over the whole sequence."""
        size = x_SB.shape[0] // self.chunks
        return x_SB[self.chunk * size : (self.chunk + 1) * size]

    def positions(self, length: int, device: torch.device) -> Tensor:
        """int64 [s], positions in the sequence of this slice of `length` tokens."""
        return torch.arange(length, device=device) + self.chunk * length


@dataclass(frozen=True)
class Choice:
    """Decisions of one micro-batch, this rank's slice."""

    keep_sB: Tensor
    """bool."""
    margin_sB: Tensor | None = None
    """float32, distance of each decision from its threshold; None where decisions were imposed."""


class Router(nn.Module):
    """Base of all routers; a subclass says whom it chooses."""

    multiplies = False
    """Whether an executed branch is multiplied by the gate; otherwise the gate only carries a gradient."""

    def __init__(self, routing: RoutingConfig, unit: Unit, target: float) -> None:
        super().__init__()
        self.routing, self.unit, self.target = routing, unit, target

    def logits(self, h_sBH: Tensor) -> Tensor | None:
        """What decisions are made from, float32 [s, B], or None when the tokens do not matter.

        A router may stack several such readings; the tensor is handed back to `decide` and `gate` as it is.
        """
        return None

    def decide(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        """The choice for a slice, unless a debug mode or a recorded plan overrules it.

        Args:
            logit_sB: what `logits` made of it.
            h_sBH: the slice, for its shape and device.
        """
        if self.unit.key in context.replay:
            return Choice(place.slice(context.replay[self.unit.key]))
        if self.routing.force is not None:
            positions = place.positions(h_sBH.shape[0], h_sBH.device)
            return Choice(forced_decisions(self.routing.force, positions, h_sBH.shape[1], self.target_at(context.step)))
        return self.choose(None if logit_sB is None else logit_sB.detach(), h_sBH, place, context)

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        """The router's own choice."""
        raise NotImplementedError

    def gate(self, logit_sB: Tensor | None, keep_sB: Tensor, place: Place, context: RoutingContext) -> Tensor | None:
        """float32 [s, B] that carries the router's gradient, or None when it has none."""
        return None

    def overruled(self, context: RoutingContext) -> bool:
        """Whether decisions are not the router's own, so that it has nothing to learn from them."""
        return self.routing.force is not None or self.unit.key in context.replay

    def target_at(self, step: int) -> float:
        """Target density at an optimizer step."""
        return self.routing.target(self.target, step)

    def uniform(self, length: int, batch: int, place: Place, context: RoutingContext, device: torch.device) -> Tensor:
        """The noise of this unit, float32 [length, batch] in (0, 1).

        Outside training it depends on the seed, the unit and the position alone: whatever else is in the batch, and
        however often a prefix is seen again, the same numbers come back.
        """
        positions = place.positions(length, device)
        if self.training:
            return uniform(context.seed, context.step, self.unit.key, context.samples_B.to(device), positions)
        nobody_B = torch.zeros(batch, dtype=torch.int64, device=device)
        return uniform(context.seed, 0, self.unit.key, nobody_B, positions)

    def update(self, density: float, step: int, soft: float = 0.0) -> None:
        """After a step: what the router remembers of the global batch.

        Args:
            density: share of tokens executed.
            step: the step that was done, from 0.
            soft: mean probability of executing.
        """


class LinearRouter(Router):
    """A linear map from the normed input of a unit to the logits (skip, execute), without bias, in float32."""

    def __init__(self, routing: RoutingConfig, unit: Unit, target: float, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(routing, unit, target)
        self.weight = nn.Parameter(torch.zeros(2, hidden_size, dtype=dtype))

    def logits(self, h_sBH: Tensor) -> Tensor:
        """logit_execute - logit_skip; a token is executed when this (plus noise in training) is above 0."""
        weight_H = self.weight[1].float() - self.weight[0].float()
        return F.linear(h_sBH.float(), weight_H[None])[..., 0]

    def noisy(self, logit_sB: Tensor, place: Place, context: RoutingContext) -> Tensor:
        """The logits, in training with logistic noise."""
        factor = self.routing.noise_at(context.step) if self.training else 0.0
        if factor == 0:
            return logit_sB
        length, batch = logit_sB.shape
        return logit_sB + factor * logistic(self.uniform(length, batch, place, context, logit_sB.device))
