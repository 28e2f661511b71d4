"""A lane: a sequential machine that reads its own slices and packs their tokens into rows.

Of the endless sequence of slices of each source, lane v of V reads places v, v + V, v + 2V, ..  Of the endless sequence
of rows it makes the same places: row g belongs to lane g % V.  So every slice of every epoch is read by one lane, once,
however few slices there are, and which process runs a lane changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megaroute.common.errors import DamagedShard, DataError
from megaroute.common.log import get_logger
from megaroute.data.order import Order
from megaroute.data.packing import Packing
from megaroute.data.rows import PADDING, LaneState, Opened, Position, Row, Skip, Span, row_digest

log = get_logger(__name__)

WEYL = 2654435769  # 2^32 over the golden ratio: its multiples fill the circle evenly, however many there are


class TokenSource(Protocol):
    """Documents as tokens, and the order in which to read them."""

    @property
    def name(self) -> str:
        """Name of the source."""

    @property
    def weight(self) -> float:
        """Share of the tokens, relative to other sources."""

    @property
    def order(self) -> Order:
        """Slices and their documents, epoch after epoch."""

    def ids(self, shard: int, document: int) -> np.ndarray:
        """Token ids, int32, of one document, end-of-document included.

        Raises DamagedShard when it is lost for good, DataError when it cannot be read for another reason.
        """


@dataclass
class _Open:
    """A document at hand."""

    place: Opened
    epoch: int
    shard: int
    number: int
    ids: np.ndarray
    offset: int

    @property
    def left(self) -> int:
        return len(self.ids) - self.offset


class Lane:
    """Makes the rows of one lane.

    The same sources, arguments and state make the same rows.  `length` is the tokens of a row (S + 1).  With
    `skip_budget` None a document that cannot be read is an error; otherwise the rest of its slice is skipped, for at
    most so many slices.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        length: int,
        sources: Sequence[TokenSource],
        packing: Packing,
        state: LaneState | None = None,
        skip_budget: int | None = None,
    ) -> None:
        self.number, self.lanes, self.length = number, lanes, length
        self._sources = {source.name: source for source in sources}
        self._share = {source.name: source.weight / sum(s.weight for s in sources) for source in sources}
        self._packing, self._budget = packing, skip_budget
        state = state or LaneState()
        self._made, self._skipped = state.made, list(state.skipped)
        self._at = {name: state.sources.get(name, Position()) for name in self._sources}
        self._slices: dict[str, tuple[int, tuple[int, int, np.ndarray]]] = {}
        self._to_open = state.open
        self._open: list[_Open] = []

    def next(self) -> Row:
        """The lane's next row.  Raises DamagedShard when a document is lost and may not be skipped."""
        ids = np.full(self.length, PADDING, np.int32)
        spans: list[Span] = []
        filled = 0
        while filled < self.length:
            self._hold_ready()
            left = [document.left for document in self._open]
            piece = self._packing.next_piece(left, self.length - filled, self.length)
            if piece is None:
                break
            span, part = self._take(piece.number, piece.tokens)
            ids[filled : filled + span.tokens] = part
            filled += span.tokens
            spans.append(span)
        sample = self._made * self.lanes + self.number
        self._made += 1
        digest = row_digest(sample, ids, tuple(spans))
        return Row(sample, self.number, ids, tuple(spans), self._state(), digest)

    def _state(self) -> LaneState:
        opened = tuple(document.place._replace(offset=document.offset) for document in self._open)
        return LaneState(self._made, dict(self._at), opened, tuple(self._skipped))

    def _take(self, index: int, count: int) -> tuple[Span, np.ndarray]:
        """The next `count` tokens of an open document."""
        document = self._open[index]
        offset = document.offset
        document.offset += count
        if not document.left:
            del self._open[index]
        name = document.place.source
        self._at[name] = self._at[name]._replace(taken=self._at[name].taken + count)
        span = Span(name, document.epoch, document.shard, document.number, offset, count)
        return span, document.ids[offset : offset + count]

    def _hold_ready(self) -> None:
        for place in self._to_open:
            document = self._read(place)
            if document is not None:
                self._open.append(document)
        self._to_open = ()
        while len(self._open) < self._packing.depth:
            self._open.append(self._next_document())

    def _next_document(self) -> _Open:
        """The next document of the source that is furthest behind its share, slice after slice, for ever."""
        while True:
            name = self._furthest_behind()
            at = self._at[name]
            if at.document >= len(self._slice(name, at.slice)[2]):
                self._at[name] = at._replace(slice=at.slice + 1, document=0)
                continue
            document = self._read(Opened(name, at.slice, at.document, 0))
            if document is not None:
                self._at[name] = at._replace(document=at.document + 1)
                return document

    def _furthest_behind(self) -> str:
        """Shares exact in tokens, without a random number; of equals, the first name."""
        has = {name: at.taken for name, at in self._at.items()}
        for document in self._open:
            has[document.place.source] += document.left
        total = sum(has.values()) + 1
        if total == 1:
            return self._first_source()
        return max(has, key=lambda name: self._share[name] * total - has[name])

    def _first_source(self) -> str:
        """Lanes begin with different sources, as many with each as its share: otherwise they would go in step, and
        a batch would be of one source."""
        phase = self.number * WEYL % 2**32 / 2**32
        for name, share in self._share.items():
            phase -= share
            if phase < 0:
                return name
        return list(self._share)[-1]  # the shares add up to less than 1 by a rounding error

    def _slice(self, name: str, number: int) -> tuple[int, int, np.ndarray]:
        """(epoch, shard, document numbers) of the lane's slice `number`."""
        held = self._slices.get(name)
        if held is None or held[0] != number:
            held = number, self._sources[name].order.documents(number * self.lanes + self.number)
            self._slices[name] = held
        return held[1]

    def _read(self, place: Opened) -> _Open | None:
        """The document at `place`; None when it cannot be read, and its slice is given up."""
        epoch, shard, numbers = self._slice(place.source, place.slice)
        number = int(numbers[place.document])
        try:
            ids = self._sources[place.source].ids(shard, number)
        except DamagedShard as error:
            self._give_up(place, error)
            return None
        return _Open(place, epoch, shard, number, ids, place.offset)

    def _give_up(self, place: Opened, error: DamagedShard) -> None:
        """Skip the rest of the slice; what the lane holds of it already is still used."""
        if self._budget is None:
            raise error
        self._skipped.append(Skip(place.source, place.slice, place.document))
        if len(self._skipped) > self._budget:
            raise DataError(
                f"lane {self.number} of the data skipped {len(self._skipped)} slices, more than data.skip_budget "
                f"{self._budget}, the last because {error}; repair the shards, or raise data.skip_budget"
            ) from error
        log.warning("skipping the rest of a slice of %s: %s", place.source, error)
        at = self._at[place.source]
        if at.slice == place.slice:
            self._at[place.source] = at._replace(slice=at.slice + 1, document=0)
