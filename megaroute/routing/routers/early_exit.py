"""Early exit as a rival: a token that stops stays stopped."""

from torch import Tensor

from megaroute.routing.context import RoutingContext
from megaroute.routing.routers.base import Choice, Place
from megaroute.routing.routers.gumbel import GumbelRouter


class EarlyExitRouter(GumbelRouter):
    """Goes on with a token when logit + noise > 0 and the routed layer before went on with it.

    Later layers see the keys and values of a stopped token as it was when it stopped.  Density counts all tokens, so
    targets that fall with depth say what is meant; a layer cannot execute more than the one before.
    """

    def choose(self, logit_sB: Tensor | None, h_sBH: Tensor, place: Place, context: RoutingContext) -> Choice:
        choice = super().choose(logit_sB, h_sBH, place, context)
        alive_sB = self._alive(place, context)
        if alive_sB is None or choice.margin_sB is None:
            return choice
        # A stopped token lies below every threshold, whatever its logit says.
        margin = choice.margin_sB.where(alive_sB, -choice.margin_sB.abs() - 1.0)
        return Choice(margin > 0, margin)

    def probability(self, logit_sB: Tensor, place: Place, context: RoutingContext) -> Tensor:
        """As in the method, and 0 for stopped tokens; so the budget pulls at those that could still go on."""
        probability = super().probability(logit_sB, place, context)
        alive_sB = self._alive(place, context)
        return probability if alive_sB is None else probability * alive_sB

    def _alive(self, place: Place, context: RoutingContext) -> Tensor | None:
        """bool [s, B], tokens that the routed layer before went on with; None in the first routed layer."""
        before = [key for key in context.records if key < self.unit.key]
        return place.slice(context.records[max(before)].keep_SB) if before else None
