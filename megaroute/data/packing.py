"""How documents fill rows."""

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """What goes next into a row: `tokens` of the open document `number`."""

    number: int
    tokens: int


class Concat:
    """Documents one after another; what does not fit continues in the lane's next row."""

    depth = 1
    """Documents held open."""

    def next_piece(self, left: Sequence[int], space: int) -> Piece:
        """What fills `space` tokens, of open documents that have `left` tokens left."""
        return Piece(0, min(left[0], space))
