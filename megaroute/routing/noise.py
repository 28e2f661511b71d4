"""Routing noise as a function of what is being routed, not of a generator's state.

The same (seed, step, unit, sample, position) gives the same number on every rank, under any micro-batch size, and again
when activations are recomputed; nothing has to be saved, sent or forked.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive integers

LARGEST_LOGISTIC = 24 * math.log(2.0)
"""No noise is larger: that of a uniform number of 1 - 2^-24."""


def _mix(x: Word) -> Word:
    """The 32-bit finaliser of MurmurHash3 (A. Appleby, public domain) on 32-bit values, also those of an int64 tensor.

    A product that overflows int64 has the right low 32 bits all the same.
    """
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def uniform(seed: int, step: int, unit: int, samples_B: Tensor, positions_S: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), multiples of 2^-24.

    Args:
        seed, step, unit: integers below 2^63.
        samples_B: int64 [B], global sample numbers.
        positions_S: int64 [S], positions in the sequence.

    Returns:
        float32 [S, B].
    """
    key = 0  # a plain number as long as it can be: every operation on a tensor costs a launch
    for word in (seed, step, unit):
        for half in (word & _MASK, word >> 32):
            key = _mix((key + half + _GOLDEN) & _MASK)
    key_B = torch.full_like(samples_B, key)
    for half_B in (samples_B & _MASK, samples_B >> 32):
        key_B = _mix((key_B + half_B + _GOLDEN) & _MASK)
    x_SB = _mix((key_B[None, :] + (positions_S[:, None] + 1) * _GOLDEN) & _MASK)
    x_SB = _mix(x_SB ^ key_B[None, :])
    # 23 bits and a half: every value and its distance from 1 are exact in float32.
    return ((x_SB >> 9).float() + 0.5) * 2.0**-23


def logistic(uniform_SB: Tensor) -> Tensor:
    """Standard logistic noise, which is the difference of two independent Gumbel variables.

    So `logits_execute - logits_skip + logistic > 0` is the argmax of the two Gumbel-perturbed logits of the
    Gumbel-max trick (Maddison et al. 2017, "The Concrete Distribution", section 2 and appendix B).
    """
    return torch.log(uniform_SB) - torch.log1p(-uniform_SB)
