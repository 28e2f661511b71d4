"""The method: a learned binary router with straight-through Gumbel-softmax."""

import torch
from torch import Tensor

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.budget import correct, pull
from megaroute.routing.context import RoutingContext
from megaroute.routing.routers.base import Choice, LinearRouter, Place
from megaroute.routing.state import RouterState


class GumbelRouter(LinearRouter):
    """Executes a token when logit + noise > 0, the argmax of two Gumbel-perturbed logits; greedy outside training."""

    def __init__(self, routing: RoutingConfig, unit: Unit, target: float, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(routing, unit, target, hidden_size, dtype)
        self.multiplies = routing.gate == "probability"
        self.state = RouterState()

    def logits(self, h_sBH: Tensor) -> Tensor:
        return super().logits(h_sBH) + self.state.bias

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        assert logit_sB is not None
        margin = self.noisy(logit_sB, place, context)
        return Choice(margin > 0, margin)

    def gate(self, logit_sB: Tensor | None, keep_sB: Tensor, place: Place, context: RoutingContext) -> Tensor | None:
        """Probability of executing; its gradient already has the budget's pull in it."""
        assert logit_sB is not None
        probability = self.probability(logit_sB, place, context)
        if self.overruled(context):  # it still takes part in the backward pass
            return probability.detach() + 0.0 * probability
        return self._pulled(probability, keep_sB, place, context)

    def probability(self, logit_sB: Tensor, place: Place, context: RoutingContext) -> Tensor:
        """Probability of executing, float32 [s, B], whose gradient stands in for that of the decision."""
        relaxed = self.noisy(logit_sB, place, context) if self.routing.estimator == "st_gumbel" else logit_sB
        return torch.sigmoid(relaxed / self.routing.temperature_at(context.step))

    def _pulled(self, probability: Tensor, keep_sB: Tensor, place: Place, context: RoutingContext) -> Tensor:
        budget = self.routing.budget
        if not self.training or budget.weight == 0:
            return probability
        real_SB, target = context.real_SB, self.target_at(context.step)
        real_sB = None if real_SB is None else place.slice(real_SB)
        tokens: float | Tensor = context.mean_tokens or keep_sB.numel() * place.chunks
        density = self.state.density
        if budget.estimator == "microbatch":
            mine = place.whole(keep_sB.float() if budget.density == "hard" else probability.detach())
            if real_SB is not None:
                tokens = real_SB.sum().clamp(min=1)
                mine = mine * real_SB
            density = mine.sum() / tokens
        return pull(probability, density, target, budget.weight, context.budget_scale, tokens, real_sB)

    @torch.no_grad()
    def update(self, density: float, step: int, soft: float = 0.0) -> None:
        """Remember the density that the budget is about; let the controller correct the bias by the hard one."""
        self.state.density.fill_(density if self.routing.budget.density == "hard" else soft)
        controller = self.routing.controller
        correct(self.state.bias, self.state.slope, density - self.target_at(step), controller.gain, controller.trend)
