"""`routing_trace.json`: what each token of a few validation passages executed, routed as at inference."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaroute.config.units import Unit

FILE_NAME = "routing_trace.json"
FORMAT = 1


@dataclass(frozen=True)
class Passage:
    """One passage of T tokens."""

    tokens: tuple[str, ...]
    """Text of each token, [T]."""
    keep: tuple[tuple[bool, ...], ...]
    """Whether each routed unit executed each token, [units][T]."""
    loss: tuple[float | None, ...]
    """Cost in nats of predicting the token after each token, [T]; None where there is none."""


@dataclass(frozen=True)
class Trace:
    """The passages, and the model that routed them."""

    step: int
    num_layers: int
    units: tuple[Unit, ...]
    density_target: float | None
    passages: tuple[Passage, ...]

    @property
    def by_branch(self) -> bool:
        """Whether routers stand in front of attention or MLP, so that branches are counted, two a layer."""
        return any(unit.part != "layer" for unit in self.units)

    @property
    def counted(self) -> str:
        """What is counted: layers or branches."""
        return "branches" if self.by_branch else "layers"

    @property
    def total(self) -> int:
        """Layers or branches of the model."""
        return 2 * self.num_layers if self.by_branch else self.num_layers


def read_trace(path: str | Path) -> Trace:
    """Read a trace.  Raises OSError when the file cannot be read, and ValueError when it is not a trace of FORMAT."""
    raw = json.loads(Path(path).read_bytes())
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, this version reads {FORMAT}")
        num_layers, units = int(raw["num_layers"]), _units(raw)
        if not all(0 <= unit.layer < num_layers for unit in units):
            labels = ", ".join(unit.label for unit in units)
            raise ValueError(f"routed layers {labels} are not all in a model of {num_layers} layers")
        return Trace(
            step=int(raw["step"]),
            num_layers=num_layers,
            units=units,
            density_target=raw.get("density_target"),
            passages=tuple(_passage(passage, len(units)) for passage in raw["passages"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not a routing trace ({type(error).__name__}: {error})") from error


def _units(raw: dict[str, Any]) -> tuple[Unit, ...]:
    """The routed units; a trace of a version that routed whole layers only has their numbers."""
    labels = raw["units"] if "units" in raw else raw["routed_layers"]
    return tuple(parse_label(str(label)) for label in labels)


def parse_label(label: str) -> Unit:
    """The unit of a label such as "7" or "7 mlp".  Raises ValueError when it is not one."""
    layer, _, part = label.partition(" ")
    if part not in ("", "attention", "mlp"):
        raise ValueError(f"a routed unit is a layer, its attention or its mlp, not {label!r}")
    return Unit(int(layer), part or "layer")  # type: ignore[arg-type]  # one of the parts, see above


def _passage(raw: dict[str, Any], num_routed: int) -> Passage:
    tokens = tuple(str(token) for token in raw["tokens"])
    keep = tuple(tuple(bool(kept) for kept in row) for row in raw["keep"])
    losses = raw.get("loss") or [None] * len(tokens)
    loss = tuple(None if value is None else float(value) for value in losses)
    if len(keep) != num_routed or any(len(row) != len(tokens) for row in (*keep, loss)):
        shape = f"{len(keep)} rows of {sorted({len(row) for row in keep})} decisions, {len(loss)} losses"
        raise ValueError(f"a passage of {len(tokens)} tokens and {num_routed} routed units has {shape}")
    return Passage(tokens, keep, loss)
