"""Documents cut into rows that fit the model's context, every token scored exactly once."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A row for the model, of which the last `scored` predictions count."""

    ids: list[int]
    """T + 1 ids, T at most the context."""
    scored: int
    """1 to T; what is before them is context."""
    document: int
    """Number of the document."""


def windows(ids: list[int], context: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Windows that score ids[1:], each once.

    The first window scores all that fits; each later one scores the next `stride` tokens, and its first prediction
    looks back on the `context` - `stride` + 1 tokens before.

    Args:
        stride: 1 to `context`.
    """
    end = 0
    while end < len(ids) - 1:
        before, end = end, min(end + (stride if end else context), len(ids) - 1)
        yield Window(ids[max(0, end - context) : end + 1], end - before, document)
