"""`routing`: which layers decide per token, how, and how the kept tokens are computed."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megaroute.config.section import Section


class BudgetConfig(Section):
    """The loss that pulls each unit's density to the target: weight * sum over units of (r - P)^2."""

    weight: NonNegativeFloat = 0.1
    """Factor of the budget loss beside the cross entropy."""
    estimator: Literal["global", "microbatch"] = "global"
    """Density r whose distance from P scales the gradient.  `global`: of the whole previous step, so that neither the
    micro-batch size nor the number of replicas changes the gradient.  `microbatch`: of the micro-batch at hand, as in
    the plain formula; its loss grows with the variance between micro-batches."""


class ControllerConfig(Section):
    """An integral controller on the execute logit, without gradient, where the loss alone does not hold the density."""

    gain: NonNegativeFloat = 0.0
    """After each step: logit bias -= gain * (r - P).  0 is off."""


class DispatchConfig(Section):
    """How the kept tokens are computed."""

    mode: Literal["exact", "masked"] = "exact"
    """`exact` computes as many rows as tokens kept; `masked` computes every token and discards, for tests."""


class RoutingConfig(Section):
    """A binary router in front of a layer says execute or skip for each token."""

    router: Literal["gumbel", "dense"] = "gumbel"
    """`gumbel`: the method, a learned binary router with straight-through Gumbel-softmax.  `dense`: no router."""
    first_dense: NonNegativeInt = 0
    """That many layers at the bottom carry no router."""
    last_dense: NonNegativeInt = 0
    """That many layers at the top carry no router."""
    every: PositiveInt = 1
    """Of the layers between, every n-th carries a router, counted from the first after the dense ones."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Explicit list of routed layers, counted from 0; replaces the pattern above."""
    density: float = Field(default=0.5, gt=0, le=1)
    """Target share P of tokens that each routed layer executes, averaged over the global batch."""
    temperature: PositiveFloat = 1.0
    """Temperature of the softmax whose gradient stands in for that of the hard decision."""
    init_logit_std: PositiveFloat = 1.0
    """Standard deviation over tokens of (execute - skip) logits at initialisation.  Large values make the decision
    depend on the token rather than on the noise."""
    force: Literal["keep_all", "keep_none", "fixed_ratio"] | None = None
    """Debug: overrule every decision.  `fixed_ratio` keeps evenly spaced positions at the target density."""
    budget: BudgetConfig = BudgetConfig()
    controller: ControllerConfig = ControllerConfig()
    dispatch: DispatchConfig = DispatchConfig()

    def routed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices, from 0, of the layers that carry a router in a model of `num_layers` layers."""
        if self.router == "dense":
            return ()
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        return tuple(range(self.first_dense, num_layers - self.last_dense, self.every))
