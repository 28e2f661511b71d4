"""`routing`: which layers decide per token, how, and how the kept tokens are computed."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megaroute.config.routers import (
    AlarmConfig,
    AnnealConfig,
    BudgetConfig,
    CapacityConfig,
    ControllerConfig,
    DispatchConfig,
    ModConfig,
    MoeConfig,
)
from megaroute.config.section import Section
from megaroute.config.units import Part, Unit

Density = Annotated[float, Field(gt=0, le=1)]

PARTS: dict[str, tuple[Part, ...]] = {
    "layer": ("layer",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "separate": ("attention", "mlp"),
}


class RoutingConfig(Section):
    """A router in front of a layer, or of its attention or MLP, says execute or skip for each token."""

    router: Literal["gumbel", "dense", "random", "highway", "mod", "early_exit", "random_ltd", "moe"] = "gumbel"
    """`gumbel`: the method, a learned binary router with straight-through Gumbel-softmax.  `dense`: no router.  What it
    is compared with: `random` (each token with probability P, nothing learned), `highway` (a soft gate, everything
    computed), `mod` (Mixture-of-Depths: the top P of the sequence; training is not causal), `early_exit` (a token that
    stops stays stopped), `random_ltd` (a random subset of equal size in training, dense at inference), `moe` (a
    mixture of experts in place of the MLP)."""
    unit: Literal["layer", "attention", "mlp", "separate"] = "layer"
    """What a router stands in front of; `separate`: attention and MLP each have one."""
    first_dense: NonNegativeInt = 0
    """That many layers at the bottom carry no router."""
    last_dense: NonNegativeInt = 0
    """That many layers at the top carry no router."""
    every: PositiveInt = 1
    """Of the layers between, every n-th carries a router, counted from the first after the dense ones."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Explicit list of routed layers, counted from 0; replaces the pattern above."""
    density: Density = 0.5
    """Target share P of tokens that each unit executes, averaged over the global batch."""
    densities: tuple[Density, ...] | None = None
    """Target of each routed layer, from the bottom; replaces `density`."""
    density_anneal: AnnealConfig | None = None
    """Start the target elsewhere, as a rule at 1, and bring it to P over some steps."""
    estimator: Literal["st_gumbel", "st_sigmoid"] = "st_gumbel"
    """Whose gradient stands in for that of the hard decision: the softmax of the logits with the noise of the decision
    (`st_gumbel`, straight-through Gumbel-softmax), or without it (`st_sigmoid`)."""
    gate: Literal["straight_through", "probability"] = "straight_through"
    """Factor of an executed unit's branch: 1, with a straight-through gradient, or the probability of executing."""
    gradient: Literal["executed", "all"] = "executed"
    """Tokens that give the router a gradient of the cross entropy.  `all` needs what skipped tokens would have become,
    so it needs dispatch.mode masked and saves nothing."""
    benefit: Literal["first_order", "second_order"] = "first_order"
    """By how much an executed branch is taken to have lowered the loss, which is what the router learns from.
    `first_order`: by the slope of the loss at the executed gate (the straight-through estimator).  `second_order`: by
    that slope and half its square, which stands in for the curvature; costs nothing more.  See docs/routing.md."""
    temperature: PositiveFloat = 1.0
    """Temperature of the softmax whose gradient stands in for that of the hard decision."""
    temperature_anneal: AnnealConfig | None = None
    """Start the temperature elsewhere."""
    noise: NonNegativeFloat = 1.0
    """Factor of the noise on the logits in training."""
    noise_anneal: AnnealConfig | None = None
    """Start that factor elsewhere."""
    init_logit_std: PositiveFloat = 1.0
    """Standard deviation over tokens of (execute - skip) logits at initialisation.  Large values make the decision
    depend on the token rather than on the noise."""
    lr_factor: PositiveFloat = 1.0
    """Factor of the learning rate for the routers' weights."""
    weight_decay: bool = True
    """Whether weight decay applies to the routers' weights."""
    causal_evaluation: bool = True
    """Promise that validation and generation decide from earlier tokens only; a router that cannot is refused."""
    force: Literal["keep_all", "keep_none", "fixed_ratio"] | None = None
    """Debug: overrule every decision.  `fixed_ratio` keeps evenly spaced positions at the target density."""
    budget: BudgetConfig = BudgetConfig()
    controller: ControllerConfig = ControllerConfig()
    dispatch: DispatchConfig = DispatchConfig()
    capacity: CapacityConfig = CapacityConfig()
    mod: ModConfig = ModConfig()
    moe: MoeConfig = MoeConfig()
    alarm: AlarmConfig = AlarmConfig()

    def routed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Indices, from 0, of the layers that carry a router in a model of `num_layers` layers."""
        if self.router == "dense":
            return ()
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        return tuple(range(self.first_dense, num_layers - self.last_dense, self.every))

    def units(self, num_layers: int) -> tuple[Unit, ...]:
        """Routed units of a model of `num_layers` layers, in the order in which a token meets them."""
        return tuple(Unit(layer, part) for layer in self.routed_layers(num_layers) for part in PARTS[self.unit])

    def targets(self, num_layers: int, step: int | None = None) -> tuple[float, ...]:
        """Target density of each unit, at an optimizer step from 0, or in the end when `step` is None."""
        layers = self.routed_layers(num_layers)
        final = self.densities or (self.density,) * len(layers)
        return tuple(self.target(density, step) for density in final for _ in PARTS[self.unit])

    def target(self, final: float, step: int | None) -> float:
        """Target at an optimizer step of a unit whose final target is `final`."""
        if self.density_anneal is None or step is None:
            return final
        return self.density_anneal.value(final, step)

    def temperature_at(self, step: int) -> float:
        """Temperature at an optimizer step."""
        return self.temperature_anneal.value(self.temperature, step) if self.temperature_anneal else self.temperature

    def noise_at(self, step: int) -> float:
        """Factor of the noise at an optimizer step."""
        return self.noise_anneal.value(self.noise, step) if self.noise_anneal else self.noise
