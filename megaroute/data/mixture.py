"""Which source a row is of: shares of a mixture that are exact to a row, without a random number.

Each row is of the source that is furthest behind its share of the tokens.  Lane v goes on as if v rows had been made
before its first, so that lanes do not go in step: of the n-th rows of all lanes, too, each source has its share.
"""

from collections.abc import Sequence
from functools import cache

BLOCK = 1024
"""Lanes that share the work of going ahead."""


def furthest_behind(shares: Sequence[float], tokens: Sequence[int], length: int) -> int:
    """The source that misses a row of `length` tokens most, where each has so many `tokens`; of equals, the first.

    The greedy rule by which Megatron-core blends datasets, but on tokens.  `shares` add up to 1.
    """
    if len(shares) == 1:
        return 0
    total = sum(tokens) + length
    return max(range(len(shares)), key=lambda i: shares[i] * total - tokens[i])


def rows_ahead(shares: tuple[float, ...], count: int) -> tuple[int, ...]:
    """How many of the first `count` rows are of each source."""
    return _rows_of_each(shares, (count // BLOCK + 1) * BLOCK)[count]


@cache
def _rows_of_each(shares: tuple[float, ...], rows: int) -> list[tuple[int, ...]]:
    """Rows of each source among the first 0, 1, .. rows - 1 rows."""
    made = [0] * len(shares)
    counts = []
    for _ in range(rows):
        counts.append(tuple(made))
        made[furthest_behind(shares, made, 1)] += 1
    return counts
