"""Which tokens a unit executes, and what the tokens of a call see.  Shapes as in modeling_megaroute.py."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Tokens that a unit executes."""

    index_R: Tensor | None
    """int64, rows of the flattened tokens; None for all of them."""
    counts_B: list[int] | None
    """How many of each sample; None for all."""
    gate_R: Tensor | None
    """float32, factor of what the unit adds; None for 1."""

    def take(self, x_BTH: Tensor) -> Tensor:
        """These rows, [R, H]."""
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        return x_NH if self.index_R is None else x_NH.index_select(0, self.index_R)

    def add(self, x_BTH: Tensor, branch_RH: Tensor) -> Tensor:
        """`x_BTH` with the branch added to these rows; every other token passes untouched."""
        if self.gate_R is not None:
            branch_RH = branch_RH * self.gate_R[:, None].to(branch_RH.dtype)
        if self.index_R is None:
            return x_BTH + branch_RH.view_as(x_BTH)
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        return x_NH.index_copy(0, self.index_R, self.take(x_BTH) + branch_RH).view_as(x_BTH)


EVERY = Rows(None, None, None)


@dataclass
class Sight:
    """What the tokens of one call are, see and have decided."""

    cos_BTD: Tensor
    sin_BTD: Tensor
    positions_BT: Tensor
    past: int
    """Keys in the cache before this call."""
    present_BL: Tensor | None = None
    """bool, False at padding; None without padding."""
    starts_BT: Tensor | None = None
    """int64, first key that a token sees; None for all."""
    given_BTL: Tensor | None = None
    """bool, who sees whom, where the caller says so."""
    decisions: list[Tensor] = field(default_factory=list)
    """bool [B, T] of each routed unit so far."""
    _masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def present_BT(self) -> Tensor | None:
        """bool, False at padding, of the tokens of this call."""
        return None if self.present_BL is None else self.present_BL[:, -self.positions_BT.shape[1] :]

    def plain(self, keys: int) -> bool:
        """Whether attention is plainly causal over the tokens of this call, or one token sees all keys."""
        tokens = self.positions_BT.shape[1]
        free = self.present_BL is None and self.starts_BT is None and self.given_BTL is None
        return free and keys == self.past + tokens and (tokens == 1 or self.past == 0)

    def mask(self, keys: int) -> Tensor:
        """bool [B, T, L], which of `keys` keys each token sees.  Padding sees itself, so that no row is empty."""
        if keys not in self._masks:
            self._masks[keys] = self._mask(keys)
        return self._masks[keys]

    def _mask(self, keys: int) -> Tensor:
        if self.given_BTL is not None:
            return self.given_BTL
        batch, tokens = self.positions_BT.shape
        key_L = torch.arange(keys, device=self.positions_BT.device)
        query_T = torch.arange(self.past, self.past + tokens, device=key_L.device)
        seen = (key_L <= query_T[:, None]).expand(batch, -1, -1)
        if self.present_BL is not None:
            missing = keys - self.present_BL.shape[1]  # a cache of fixed length has keys not yet written
            seen = seen & F.pad(self.present_BL, (0, missing))[:, None]
        if self.starts_BT is not None:
            seen = seen & (key_L >= self.starts_BT[..., None])
        return seen | (key_L == query_T[:, None])
