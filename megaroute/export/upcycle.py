"""Routers for a dense model: the first step computes the dense model, and training then takes the density down.

At first a router's weights are 0 and its bias is above the largest noise there can be, so that every token is executed,
in training and at inference.  The target falls from 1 (routing.density_anneal), and the controller brings the bias down
with it.  With all of its noise a bias that high would take long to come down, so the noise grows meanwhile
(routing.noise_anneal).  A trend of the controller would wind up while nothing is skipped yet, and has none here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaroute.common.errors import ConfigError
from megaroute.config.root import Config
from megaroute.config.routing_checks import LEARNED_BINARY
from megaroute.routing.noise import LARGEST_LOGISTIC

ANNEAL_STEPS = 1000
ABOVE = 0.1
"""Distance of the first decisions from their threshold."""


def upcycled_routing(num_layers: int) -> dict[str, Any]:
    """The `routing` section unless told otherwise: settings that won in docs/quality.md, and a dense start."""
    return {
        "router": "gumbel",
        "first_dense": min(2, num_layers - 1),
        "density": 0.5,
        "density_anneal": {"start": 1.0, "steps": ANNEAL_STEPS},
        "noise_anneal": {"start": 0.2, "steps": ANNEAL_STEPS},
        "estimator": "st_sigmoid",
        "benefit": "second_order",
        "budget": {"weight": 0.01},
        "controller": {"gain": 2.0},
    }


def check_upcycled(config: Config) -> None:
    """Raise ConfigError, naming the key, for a router that cannot begin as the dense model."""
    routing = config.routing
    if routing.router not in LEARNED_BINARY:
        raise ConfigError(
            f"routing.router {routing.router} cannot begin as a dense model and be trained away from it; use "
            f"{' or '.join(LEARNED_BINARY)}, or import with --as dense"
        )
    if routing.gate != "straight_through":
        raise ConfigError(
            f"routing.gate {routing.gate} multiplies branches from the first step, so that would not be the dense "
            "model; use routing.gate=straight_through"
        )
    if any(target < 1 for target in routing.targets(config.model.num_layers, step=0)):
        raise ConfigError(
            f"routing.density_anneal {routing.density_anneal} does not begin at 1, so the first step would not be that "
            "of the dense model; set routing.density_anneal.start=1"
        )


def router_tensors(config: Config, dtype: torch.dtype) -> dict[str, Tensor]:
    """What an upcycled router begins with, by the ends of the names in a checkpoint."""
    bias = config.routing.noise_at(0) * LARGEST_LOGISTIC + ABOVE
    weight = torch.zeros(2, config.model.hidden_size, dtype=dtype)
    return {"weight": weight, "state.bias": torch.tensor(bias), **memory(1.0)}


def memory(density: float) -> dict[str, Tensor]:
    """What a router remembers besides what it decides with, as if it had executed `density` of the step before."""
    return {"state.density": torch.tensor(density), "state.slope": torch.tensor(0.0)}


def exported_routing(settings: dict[str, Any]) -> dict[str, Any]:
    """The `routing` section of one of our own exports, as far as inference knows it."""
    layers, router = list(settings["routed_layers"]), settings["router"]
    if not layers:
        return {"router": "dense"}
    parts = len(settings["router_densities"]) // len(layers)
    found: dict[str, Any] = {"router": router, "unit": settings["router_unit"], "layers": layers}
    found["densities"] = list(settings["router_densities"])[::parts]
    if router in LEARNED_BINARY:
        found["gate"] = "probability" if settings["router_multiplies"] else "straight_through"
        found["temperature"] = settings["router_temperature"]
    return found


def states(config: Config) -> Iterator[tuple[str, float]]:
    """(prefix of a router in a checkpoint, its target in the end), of routers that remember something."""
    targets = config.routing.targets(config.model.num_layers)
    for unit, target in zip(config.units, targets, strict=True):
        if config.routing.router in LEARNED_BINARY:
            yield f"decoder.layers.{unit.layer}.units.{unit.part}.router.", target
