"""`routing_trace.json`: which layers each token of a few validation passages executed, with greedy routing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "routing_trace.json"
FORMAT = 1


@dataclass(frozen=True)
class Passage:
    """One passage of T tokens."""

    tokens: tuple[str, ...]
    """Text of each token, [T]."""
    keep: tuple[tuple[bool, ...], ...]
    """Whether each routed layer executed each token, [routed layers][T]."""
    loss: tuple[float | None, ...]
    """Cost in nats of predicting the token after each token, [T]; None where there is none."""


@dataclass(frozen=True)
class Trace:
    """The passages, and the model that routed them."""

    step: int
    num_layers: int
    routed_layers: tuple[int, ...]
    density_target: float | None
    passages: tuple[Passage, ...]


def read_trace(path: str | Path) -> Trace:
    """Read a trace.  Raises OSError when the file cannot be read, and ValueError when it is not a trace of FORMAT."""
    raw = json.loads(Path(path).read_bytes())
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"its format is {raw['format']!r}, this version reads {FORMAT}")
        num_layers, layers = int(raw["num_layers"]), tuple(int(layer) for layer in raw["routed_layers"])
        if not all(0 <= layer < num_layers for layer in layers):
            raise ValueError(f"routed layers {layers} are not all in a model of {num_layers} layers")
        return Trace(
            step=int(raw["step"]),
            num_layers=num_layers,
            routed_layers=layers,
            density_target=raw.get("density_target"),
            passages=tuple(_passage(passage, len(layers)) for passage in raw["passages"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is not a routing trace ({type(error).__name__}: {error})") from error


def _passage(raw: dict[str, Any], num_routed: int) -> Passage:
    tokens = tuple(str(token) for token in raw["tokens"])
    keep = tuple(tuple(bool(kept) for kept in row) for row in raw["keep"])
    losses = raw.get("loss") or [None] * len(tokens)
    loss = tuple(None if value is None else float(value) for value in losses)
    if len(keep) != num_routed or any(len(row) != len(tokens) for row in (*keep, loss)):
        shape = f"{len(keep)} rows of {sorted({len(row) for row in keep})} decisions, {len(loss)} losses"
        raise ValueError(f"a passage of {len(tokens)} tokens and {num_routed} routed layers has {shape}")
    return Passage(tokens, keep, loss)
