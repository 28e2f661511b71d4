"""Parts of the `routing` section that only some routers and dispatch modes read."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megaroute.config.section import Section


class AnnealConfig(Section):
    """A value that starts elsewhere and reaches its own key's value on a straight line."""

    start: PositiveFloat
    """Value at the beginning."""
    steps: PositiveInt
    """Optimizer steps from `start` to the final value."""
    after: NonNegativeInt = 0
    """Optimizer steps at `start` before the line begins."""

    def value(self, final: float, step: int) -> float:
        """The value at an optimizer step, counted from 0."""
        done = min(max((step - self.after) / self.steps, 0.0), 1.0)
        return self.start + (final - self.start) * done


class BudgetConfig(Section):
    """The loss that pulls each unit's density to the target: weight * sum over units of (r - P)^2."""

    weight: NonNegativeFloat = 0.1
    """Factor of the budget loss beside the cross entropy."""
    density: Literal["hard", "soft"] = "hard"
    """What r is the mean of: the decisions (`hard`, the method), or the probabilities of executing (`soft`)."""
    estimator: Literal["global", "microbatch"] = "global"
    """Density r whose distance from P scales the gradient.  `global`: of the whole previous step, so that neither the
    micro-batch size nor the number of replicas changes the gradient.  `microbatch`: of the micro-batch at hand, as in
    the plain formula; its loss grows with the variance between micro-batches."""


class ControllerConfig(Section):
    """A controller of the execute logit's bias, without gradient, where the loss alone does not hold the density.

    After each step: slope -= trend * (r - P); bias += slope - gain * (r - P).
    """

    gain: NonNegativeFloat = 0.0
    """Integral gain.  0 is off.  A change of the bias by 1 changes a density by 0.1 to 0.25, so that gains above 8
    overshoot."""
    trend: NonNegativeFloat = 0.0
    """Gain of the slope, which takes away what a steady drift of the logits leaves of r - P; a tenth of `gain` is
    stable."""


class DispatchConfig(Section):
    """How the kept tokens are computed."""

    mode: Literal["exact", "capacity", "masked"] = "exact"
    """`exact` computes as many rows as tokens kept.  `capacity` computes a fixed number of rows in training, for
    accelerators: no host synchronisation, and shapes that do not change.  `masked` computes every token and discards,
    for tests."""
    exchange: Literal["none", "dp"] = "none"
    """`dp`: replicas that keep more rows of an MLP unit than the mean send the surplus to those that keep fewer, and
    get the results back, so that all compute equally many.  Changes no result."""


class CapacityConfig(Section):
    """Rows that dispatch mode `capacity` computes.  Tokens above it are skipped, lowest margin first, and counted."""

    factor: PositiveFloat = 1.25
    """Rows per token of the target density, rounded up to a multiple of 16."""
    scope: Literal["unit", "stage"] = "unit"
    """`unit`: each unit has factor * P rows of each sample, always computed.  `stage`: a unit may also use what earlier
    units of its pipeline stage left of theirs; the stage's sum stays below its budget.  Rows that are not used are not
    computed, for which the number of kept tokens is read back to the host once per unit."""


class ModConfig(Section):
    """Mixture-of-Depths (Raposo et al. 2024): top-k over the sequence.  Training looks at later tokens."""

    predictor: bool = True
    """Train a linear predictor of membership in the top-k, which decides causally at inference."""


class MoeConfig(Section):
    """A token-choice mixture of experts in place of the MLP (Switch Transformer; top-2 as in GShard)."""

    experts: int = Field(default=4, ge=1)
    """Number of experts."""
    top_k: Literal[1, 2] = 1
    """Experts per token."""
    capacity_factor: PositiveFloat = 1.25
    """Rows of an expert, per sample, over an equal share; tokens above it pass by, lowest probability first."""
    balance_weight: NonNegativeFloat = 0.01
    """Factor of the load-balancing loss."""
    balance_estimator: Literal["sample", "global"] = "sample"
    """Tokens whose choices make the shares in that loss.  `sample`: those of each sample, as the capacity is one of
    samples.  `global`: those of the whole previous step; balances more slowly.  Neither depends on the micro-batch size
    or the number of replicas."""
    ffn_hidden_size: PositiveInt | None = None
    """Inner width of one expert; model.ffn_hidden_size / top_k when not given, the active FLOPs of the dense MLP."""


class AlarmConfig(Section):
    """When the load of a unit is worth an alarm in the metrics.

    Shares are means over the last `window` steps.  A run starts with densities far from their targets, so nothing is
    said in its first 2 * `window` steps, and those of the first window never count; after a resume, one window must
    have passed.  An alarm is told when it begins and when it has ended.
    """

    low: float = Field(default=0.01, ge=0, lt=1)
    """Collapse: the router wants fewer tokens than this share, or validation executes fewer, though the target is
    higher."""
    high: float = Field(default=0.99, gt=0, le=1)
    """Collapse: the router wants more tokens than this share, or validation executes more, though the target is
    lower."""
    drift: PositiveFloat = 0.1
    """Drift: the share of tokens that the router wants is this far from the target."""
    overflow: float = Field(default=0.2, gt=0, le=1)
    """Overflow: more of the tokens that the router wants than this share find no capacity; of `moe`, of the choices of
    experts."""
    window: PositiveInt = 50
    """Optimizer steps of the mean."""
