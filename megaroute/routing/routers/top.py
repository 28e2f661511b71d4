"""The top of a sequence: a fixed share of each sample."""

import torch
from torch import Tensor


def top_of_sequence(score_SB: Tensor, density: float, real_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The round(density * S), at least one, highest scores of each sample; the earlier one wins among equals.

    With `real_SB`, bool, S is the number of those set in the sample, and the others come last.

    Returns:
        (bool [S, B], float32 [B]: the lowest score that was taken).
    """
    if real_SB is not None:
        return _top_of_real(score_SB, density, real_SB)
    count = max(round(density * score_SB.shape[0]), 1)
    order = score_SB.argsort(dim=0, descending=True, stable=True)[:count]
    keep_SB = torch.zeros_like(score_SB, dtype=torch.bool).scatter(0, order, True)
    return keep_SB, score_SB.gather(0, order[-1:])[0]


def _top_of_real(score_SB: Tensor, density: float, real_SB: Tensor) -> tuple[Tensor, Tensor]:
    """Samples have different counts; they stay on the device."""
    count_B = (density * real_SB.sum(0).double()).round().long().clamp(min=1)
    order_SB = score_SB.masked_fill(~real_SB, -torch.inf).argsort(dim=0, descending=True, stable=True)
    first_SB = torch.arange(score_SB.shape[0], device=score_SB.device)[:, None] < count_B
    keep_SB = torch.zeros_like(real_SB).scatter(0, order_SB, first_SB)
    return keep_SB, score_SB.gather(0, order_SB.gather(0, count_B[None] - 1))[0]
