"""The top of a sequence: a fixed share of each sample."""

import torch
from torch import Tensor


def top_of_sequence(score_SB: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """The round(density * S), at least one, highest scores of each sample; the earlier one wins among equals.

    Returns:
        (bool [S, B], float32 [B]: the lowest score that was taken).
    """
    count = max(round(density * score_SB.shape[0]), 1)
    order = score_SB.argsort(dim=0, descending=True, stable=True)[:count]
    keep_SB = torch.zeros_like(score_SB, dtype=torch.bool).scatter(0, order, True)
    return keep_SB, score_SB.gather(0, order[-1:])[0]
