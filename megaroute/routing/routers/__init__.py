"""Routers behind one interface: the method and what it is compared with."""

import torch

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.routing.routers.base import Choice, LinearRouter, Place, Router
from megaroute.routing.routers.early_exit import EarlyExitRouter
from megaroute.routing.routers.gumbel import GumbelRouter
from megaroute.routing.routers.highway import HighwayRouter
from megaroute.routing.routers.mod import ModRouter
from megaroute.routing.routers.random import RandomLtdRouter, RandomRouter

__all__ = ["Choice", "Place", "Router", "build_router"]

LINEAR: dict[str, type[LinearRouter]] = {
    "gumbel": GumbelRouter,
    "highway": HighwayRouter,
    "mod": ModRouter,
    "early_exit": EarlyExitRouter,
}
BLIND: dict[str, type[Router]] = {"random": RandomRouter, "random_ltd": RandomLtdRouter}


def build_router(
    routing: RoutingConfig, unit: Unit, target: float, hidden_size: int, dtype: torch.dtype = torch.float32
) -> Router:
    """The router that `routing.router` names, for one unit with its final target density; weights not yet filled."""
    if routing.router in LINEAR:
        return LINEAR[routing.router](routing, unit, target, hidden_size, dtype)
    return BLIND[routing.router](routing, unit, target)
