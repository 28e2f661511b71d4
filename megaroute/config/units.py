"""What carries one router: a layer, or one of its two branches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["layer", "attention", "mlp"]


@dataclass(frozen=True, order=True)
class Unit:
    """One routed unit of the model."""

    layer: int
    """Index of the Transformer layer, from 0."""
    part: Part

    @property
    def key(self) -> int:
        """Number of the unit, a function of its place alone; it enters the noise."""
        return 2 * self.layer + (self.part == "mlp")

    @property
    def label(self) -> str:
        """`7`, `7 attention` or `7 mlp`."""
        return str(self.layer) if self.part == "layer" else f"{self.layer} {self.part}"


def executed_layers(num_layers: int, units: Sequence[Unit], shares: Sequence[float]) -> float:
    """Layers of `num_layers` that a token executes; attention and MLP are half a layer each.

    Args:
        shares: share of tokens that each unit executes.
    """
    parts = zip(units, shares, strict=True)
    return num_layers - sum((1.0 if unit.part == "layer" else 0.5) * (1.0 - share) for unit, share in parts)
