"""Routers that do not look at the tokens."""

import torch
from torch import Tensor

from megaroute.routing.context import RoutingContext
from megaroute.routing.routers.base import Choice, Place, Router
from megaroute.routing.routers.top import top_of_sequence


class RandomRouter(Router):
    """Executes each token with probability P, also at inference, where the same positions are drawn again and again."""

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        length, batch = h_sBH.shape[:2]
        margin = self.target_at(context.step) - self.uniform(length, batch, place, context, h_sBH.device)
        return Choice(margin > 0, margin)


class RandomLtdRouter(Router):
    """Random-LTD (Yao et al. 2022): in training a random subset, of equal size in each sample; everything at inference.

    Keys and values of the others are computed here as for every router, which the original leaves out.
    """

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        length, batch = h_sBH.shape[:2]
        if not self.training:
            return Choice(torch.ones(length, batch, dtype=torch.bool, device=h_sBH.device))
        # Every tensor rank can draw for the whole sequence; nothing has to be sent.
        score_SB = -self.uniform(length * place.chunks, batch, Place(), context, h_sBH.device)
        keep_SB, lowest_B = top_of_sequence(score_SB, self.target_at(context.step), context.real_SB)
        return Choice(place.slice(keep_SB), place.slice(score_SB) - lowest_B)
