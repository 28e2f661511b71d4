"""A lane: a sequential machine that reads its own slices and packs their tokens into rows.

Of the endless sequence of slices, lane v of V reads places v, v + V, v + 2V, ..  Of the endless sequence of rows it
makes the same places: row g belongs to lane g % V.  So every slice of every epoch is read by one lane, once, however
few slices there are, and which process runs a lane changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from pydantic import NonNegativeInt

from megaroute.data.order import Order


@dataclass(frozen=True)
class LaneState:
    """Where a lane goes on: all it needs to make its next row."""

    made: NonNegativeInt = 0
    """Rows made: the lane's next row is g = made * V + v."""
    slice: NonNegativeInt = 0
    """Slices finished."""
    document: NonNegativeInt = 0
    """Documents finished in the slice at hand."""
    offset: NonNegativeInt = 0
    """Tokens used of the document at hand; it is read and tokenised again on resume."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one document inside a row."""

    epoch: int
    """Pass over the corpus, from 0."""
    shard: int
    """Number of the shard in the manifest."""
    document: int
    """Number of the document in the shard."""
    offset: int
    """First token, counted in the document."""
    tokens: int
    """Number of tokens; the document's last one is end-of-document."""


@dataclass(frozen=True)
class Row:
    """One packed row of S + 1 tokens, for S inputs and S targets.  S = sequence length."""

    sample: int
    """Global number g of the row, from 0; never used twice in a run."""
    lane: int
    """Lane that made it: g % V."""
    ids: np.ndarray
    """Token ids, int32 [S + 1].  Rows do not overlap: the next one starts with the token after the last."""
    spans: tuple[Span, ...]
    """Documents of the row, in order; their tokens add up to S + 1."""
    state: LaneState
    """The lane's state after this row; a run that consumed the row goes on from here."""

    @property
    def starts(self) -> tuple[int, ...]:
        """Offsets in the row at which a document begins."""
        edges = np.cumsum([0, *(span.tokens for span in self.spans)])
        return tuple(int(edge) for edge, span in zip(edges, self.spans, strict=False) if span.offset == 0)

    @property
    def document_starts(self) -> np.ndarray:
        """Where in the row the document of each token starts, int32 [S + 1]; 0 for one that started in an earlier row.

        An end-of-document token belongs to the document that it ends.
        """
        lengths = [span.tokens for span in self.spans]
        return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).astype(np.int32)


@dataclass
class _Open:
    """The document at hand."""

    epoch: int
    shard: int
    number: int
    ids: np.ndarray


class Lane:
    """Makes the rows of one lane.

    `order` gives the documents of a slice, `read(shard, document)` a text, `encode(text)` its ids with the
    end-of-document token; `length` is the tokens of a row (S + 1).  The same arguments and state make the same rows.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        length: int,
        order: Order,
        read: Callable[[int, int], str],
        encode: Callable[[str], list[int]],
        state: LaneState | None = None,
    ) -> None:
        self.number, self.lanes, self.length = number, lanes, length
        self._order, self._read, self._encode = order, read, encode
        self._state = state or LaneState()
        self._documents = self._follow()
        self._open: _Open | None = None

    def next(self) -> Row:
        """The lane's next row.  Raises DataError when a document cannot be read."""
        ids = np.empty(self.length, np.int32)
        spans: list[Span] = []
        filled = 0
        while filled < self.length:
            span, part = self._take(self.length - filled)
            ids[filled : filled + span.tokens] = part
            filled += span.tokens
            spans.append(span)
        sample = self._state.made * self.lanes + self.number
        self._state = replace(self._state, made=self._state.made + 1)
        return Row(sample, self.number, ids, tuple(spans), self._state)

    def _take(self, limit: int) -> tuple[Span, np.ndarray]:
        """At most `limit` tokens of the document at hand."""
        document = self._open or next(self._documents)
        offset = self._state.offset
        part = document.ids[offset : offset + limit]
        if offset + len(part) < len(document.ids):
            self._open = document
            self._state = replace(self._state, offset=offset + len(part))
        else:
            self._open = None
            self._state = replace(self._state, document=self._state.document + 1, offset=0)
        return Span(document.epoch, document.shard, document.number, offset, len(part)), part

    def _follow(self) -> Iterator[_Open]:
        """Documents from the state on, slice after slice, for ever."""
        while True:
            epoch, shard, numbers = self._order.documents(self._state.slice * self.lanes + self.number)
            while self._state.document < len(numbers):
                number = int(numbers[self._state.document])
                ids = np.array(self._encode(self._read(shard, number)), dtype=np.int32)
                yield _Open(epoch, shard, number, ids)
            self._state = replace(self._state, slice=self._state.slice + 1, document=0)
