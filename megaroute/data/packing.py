"""How documents fill rows."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from megaroute.config.data import DataConfig


class Piece(NamedTuple):
    """What goes next into a row: `tokens` of the open document `number`."""

    number: int
    tokens: int


class Packing(Protocol):
    """Chooses what goes into a row, document by document."""

    @property
    def depth(self) -> int:
        """Documents held open, from which to choose."""

    def next_piece(self, left: Sequence[int], space: int, length: int) -> Piece | None:
        """What goes into the last `space` tokens of a row of `length`, or None to leave them empty.

        `left` are the tokens left of each open document, the one that has been open for longest first.
        """


class Concat:
    """Documents one after another; what does not fit continues in the lane's next row."""

    depth = 1

    def next_piece(self, left: Sequence[int], space: int, length: int) -> Piece | None:
        """The document at hand, as much of it as there is room for."""
        return Piece(0, min(left[0], space))


class BestFit:
    """Whole documents, the longest that fits, again and again; only one that is longer than a row is cut.

    Best-fit-decreasing as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830), but
    among `depth` documents instead of all.  A row begins with the document that has been open for longest: otherwise
    one of an awkward length could wait for ever.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def next_piece(self, left: Sequence[int], space: int, length: int) -> Piece | None:
        """The oldest document into an empty row; after that the longest that fits whole, of equals the oldest."""
        if space == length:
            return Piece(0, min(left[0], space))
        fitting = [number for number, tokens in enumerate(left) if tokens <= space]
        if not fitting:
            return None
        longest = max(fitting, key=left.__getitem__)
        return Piece(longest, left[longest])


def build_packing(data: DataConfig) -> Packing:
    """The packing that the configuration names."""
    return BestFit(data.packing_window) if data.packing == "best_fit" else Concat()


def packing_identity(data: DataConfig) -> str:
    """All that rows depend on of it, in words."""
    return f"best_fit of {data.packing_window} documents" if data.packing == "best_fit" else data.packing
