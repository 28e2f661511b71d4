"""Routers at inference: greedy and causal.  Shapes as in modeling_megaroute.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_megaroute import MegarouteConfig

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


class MegarouteRouter(nn.Module):
    """One decision per token.

    `gumbel`: execute where the logit is above 0.  `early_exit`: so, and where the routed layer before was executed.
    `mod`: where a predictor says so, the branch multiplied by sigmoid(logit).  `highway`: always, multiplied likewise.
    `random`: where a number that depends on the position alone is below the density.
    """

    def __init__(self, config: MegarouteConfig, layer: int, part: str) -> None:
        super().__init__()
        self.kind, self.multiplies = config.router, config.router_multiplies
        self.temperature, self.seed = config.router_temperature, config.router_seed
        self.unit = 2 * layer + (part == "mlp")
        place = config.routed_layers.index(layer) * len(config.routed_parts) + config.routed_parts.index(part)
        self.density = config.router_densities[place]
        if self.kind != "random":
            self.weight = nn.Parameter(torch.zeros(2, config.hidden_size))
        if self.kind in ("gumbel", "early_exit"):
            self.bias = nn.Parameter(torch.zeros(()))
        if self.kind == "mod":
            self.predictor = nn.Parameter(torch.zeros(1, config.hidden_size))

    def forward(self, h_BTH: Tensor, positions_BT: Tensor, decisions: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(bool [B, T], factor of the executed branches or None for 1); `decisions` are those of the units before."""
        if self.kind == "random":
            return uniform(self.seed, self.unit, positions_BT) < self.density, None
        logit_BT = self._logit(h_BTH)
        keep_BT = self._keep(h_BTH, logit_BT)
        if self.kind == "early_exit" and decisions:
            keep_BT = keep_BT & decisions[-1]
        return keep_BT, torch.sigmoid(logit_BT / self.temperature) if self.multiplies else None

    def _logit(self, h_BTH: Tensor) -> Tensor:
        weight_H = self.weight[1].float() - self.weight[0].float()
        logit_BT = F.linear(h_BTH.float(), weight_H[None])[..., 0]
        return logit_BT + self.bias if self.kind in ("gumbel", "early_exit") else logit_BT

    def _keep(self, h_BTH: Tensor, logit_BT: Tensor) -> Tensor:
        if self.kind == "highway":
            return torch.ones_like(logit_BT, dtype=torch.bool)
        if self.kind == "mod":
            return F.linear(h_BTH.float(), self.predictor.float())[..., 0] > 0
        return logit_BT > 0


def _mix(x):  # type: ignore[no-untyped-def]  # of an int or a tensor
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def uniform(seed: int, unit: int, positions_BT: Tensor) -> Tensor:
    """float32 in (0, 1), the numbers that training's hash (megaroute.routing.noise) gives at step 0 to sample 0."""
    key = 0
    for word in (seed, 0, unit, 0):
        for half in (word & _MASK, word >> 32):
            key = _mix((key + half + _GOLDEN) & _MASK)
    x_BT = _mix((key + (positions_BT + 1) * _GOLDEN) & _MASK)
    return ((_mix(x_BT ^ key) >> 9).float() + 0.5) * 2.0**-23
