"""What carries one router: a layer, or one of its two branches."""

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
