"""Debug modes: decisions that overrule the router."""

import torch
from torch import Tensor


def forced_decisions(mode: str, positions_S: Tensor, batch: int, density: float) -> Tensor:
    """Decisions of a debug mode, bool [S, B].

    `keep_all`, `keep_none`, or `fixed_ratio`: evenly spaced positions, those at which floor(position * density) grows.
    """
    if mode == "keep_all":
        keep_S = torch.ones_like(positions_S, dtype=torch.bool)
    elif mode == "keep_none":
        keep_S = torch.zeros_like(positions_S, dtype=torch.bool)
    elif mode == "fixed_ratio":
        keep_S = torch.floor((positions_S + 1) * density) > torch.floor(positions_S * density)
    else:
        raise ValueError(f"unknown debug mode {mode!r}; expected keep_all, keep_none or fixed_ratio")
    return keep_S[:, None].expand(-1, batch)
