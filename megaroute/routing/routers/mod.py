"""Mixture-of-Depths (Raposo et al. 2024) as a rival: the top of the sequence is executed.

Training is not causal: whether a token is among the top depends on later tokens.  The predictor decides from the
token alone and makes inference causal.  Keys and values of the others are computed here as for every router, which
the original leaves out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.context import RoutingContext
from megaroute.routing.gradient import add_gradient
from megaroute.routing.routers.base import Choice, LinearRouter, Place
from megaroute.routing.routers.top import top_of_sequence


class ModRouter(LinearRouter):
    """The P * S tokens of each sample with the highest logits, their branch multiplied by sigmoid(logit)."""

    multiplies = True

    def __init__(self, routing: RoutingConfig, unit: Unit, target: float, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(routing, unit, target, hidden_size, dtype)
        self.predictor = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype)) if routing.mod.predictor else None

    def logits(self, h_sBH: Tensor) -> Tensor:
        """[1, s, B], or [2, s, B] with the predictor's logits, through which no gradient reaches the tokens."""
        logit_sB = super().logits(h_sBH)
        if self.predictor is None:
            return logit_sB[None]
        predicted_sB = F.linear(h_sBH.detach().float(), self.predictor.float())[..., 0]
        return torch.stack((logit_sB, predicted_sB))

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        assert logit_sB is not None
        logit_sB, *predicted = logit_sB.unbind()
        if predicted and not self.training:
            return Choice(predicted[0] > 0, predicted[0])
        keep_SB, lowest_B = top_of_sequence(place.whole(logit_sB), self.target_at(context.step), context.real_SB)
        return Choice(place.slice(keep_SB), logit_sB - lowest_B)

    def gate(self, logit_sB: Tensor | None, keep_sB: Tensor, place: Place, context: RoutingContext) -> Tensor | None:
        """sigmoid(logit), with which the predictor's loss travels into the backward pass."""
        assert logit_sB is not None
        logit_sB, *predicted = logit_sB.unbind()
        gate = torch.sigmoid(logit_sB)
        for predicted_sB in predicted:
            if not self.overruled(context):
                predicted_sB = _taught(predicted_sB, keep_sB, _scale(keep_sB, place, context))
            gate = gate + 0.0 * predicted_sB
        return gate


def _scale(keep_sB: Tensor, place: Place, context: RoutingContext) -> float | Tensor:
    """Factor of each token's loss, such that the sum over a step is the mean over its tokens."""
    if context.real_SB is None or context.mean_tokens is None:
        return context.budget_scale / (keep_sB.numel() * place.chunks)
    return place.slice(context.real_SB) * (context.budget_scale / context.mean_tokens)


def _taught(predicted_sB: Tensor, keep_sB: Tensor, scale: float | Tensor) -> Tensor:
    """The prediction, with the gradient of `scale` times its summed binary cross entropy against the top-k."""
    return add_gradient(predicted_sB, (torch.sigmoid(predicted_sB.detach()) - keep_sB.float()) * scale)
