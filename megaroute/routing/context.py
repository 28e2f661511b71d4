"""What a routed unit must know about the micro-batch in front of it, and what it leaves behind."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaroute.routing.capacity import Pool


@dataclass(frozen=True)
class UnitRecord:
    """What one unit did with one micro-batch.  Rows and pairs are those of the whole micro-batch, all tensor ranks."""

    keep_SB: Tensor
    """bool [S, B], the decisions for the whole sequence."""
    margin_SB: Tensor | None
    """float32 [S, B], or this rank's slice under sequence parallelism: distance of each decision from its threshold."""
    rows: int
    """Rows computed, padding included."""
    attention_pairs: int | Tensor = 0
    """Query-key pairs computed for these rows; 0 for an MLP."""
    overflow: Tensor | None = None
    """Scalar: tokens of this rank's slice that the router wanted executed and the capacity did not allow."""
    probability: Tensor | None = None
    """Scalar: mean probability of executing over this rank's slice, detached; see RoutingContext.mean."""
    wanted_sB: Tensor | None = None
    """bool, this rank's slice of what the router chose, where a capacity may have dropped some of it."""
    counts_E: Tensor | None = None
    """int64 [experts], choices that fell on each expert, before the limit; mixtures of experts only."""


@dataclass
class RoutingContext:
    """One micro-batch as routing sees it.  Units write their record under their index; a recomputation reads it back.

    Keeping the decisions, rather than making them again from recomputed activations, rules out that a backward pass
    recomputes other rows than the forward pass kept.
    """

    seed: int = 0
    """Seed of the noise."""
    step: int = 0
    """Optimizer step that the micro-batch belongs to."""
    samples_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [B], global sample numbers of the rows, on the device where they are routed."""
    budget_scale: float = 0.0
    """Factor of the losses of this micro-batch: loss scale / micro-batches per step; 0 where nothing is learned."""
    real_SB: Tensor | None = None
    """bool [S, B], False at padding: such a position is never executed and counts in no density.  None: no padding."""
    mean_tokens: float | None = None
    """Mean number of these over all micro-batches of the step, of all replicas; None without padding."""
    replay: dict[int, Tensor] = field(default_factory=dict)
    """Debug: decisions, bool [S, B] by key of the unit, that replace the router's own."""
    records: dict[int, UnitRecord] = field(default_factory=dict)
    """Filled by the forward pass, by key of the unit."""
    pool: Pool = field(default_factory=Pool)
    """What earlier units of this stage left of their rows, where capacity is pooled."""

    def mean(self, value_sB: Tensor, real_sB: Tensor | None, chunks: int) -> Tensor:
        """Scalar: mean over the slice of one of `chunks` tensor ranks.

        With padding it is the sum over its tokens by the mean number of tokens of a slice, so that the mean of this
        over slices, micro-batches and replicas is that over the tokens of the step, however they lie.
        """
        if real_sB is None or self.mean_tokens is None:
            return value_sB.mean()
        return (value_sB * real_sB).sum() * (chunks / self.mean_tokens)
