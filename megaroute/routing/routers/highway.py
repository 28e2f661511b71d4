"""The soft gate of highway networks (Srivastava et al. 2015), as a rival: everything is computed."""

import torch
from torch import Tensor

from megaroute.routing.context import RoutingContext
from megaroute.routing.routers.base import Choice, LinearRouter, Place


class HighwayRouter(LinearRouter):
    """y = x + p * (Block(x) - x) with p = sigmoid(logit); nothing is skipped, nothing saved, no noise."""

    multiplies = True

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        assert logit_sB is not None
        return Choice(torch.ones_like(logit_sB, dtype=torch.bool), logit_sB)

    def gate(self, logit_sB: Tensor | None, keep_sB: Tensor, place: Place, context: RoutingContext) -> Tensor | None:
        """p."""
        assert logit_sB is not None
        return torch.sigmoid(logit_sB)
