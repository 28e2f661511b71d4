"""A lane: a sequential machine that reads its own slices and packs their tokens into rows, each of one source.

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
from megaroute.data.mixture import furthest_behind, rows_ahead
from megaroute.data.order import Order
from megaroute.data.packing import Packing
from megaroute.data.rows import PADDING, LaneState, Opened, Position, Row, Skip, Span, row_digest

log = get_logger(__name__)


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
        total = sum(source.weight for source in sources)
        self._shares = tuple(source.weight / total for source in sources)
        self._ahead = [rows * length for rows in rows_ahead(self._shares, number)]
        self._packing, self._budget = packing, skip_budget
        state = state or LaneState()
        self._made, self._skipped = state.made, list(state.skipped)
        self._at = {name: state.sources.get(name, Position()) for name in self._sources}
        self._slices: dict[str, tuple[int, tuple[int, int, np.ndarray]]] = {}
        self._to_open = {name: [place for place in state.open if place.source == name] for name in self._sources}
        self._open: dict[str, list[_Open]] = {name: [] for name in self._sources}

    def next(self) -> Row:
        """The lane's next row.  Raises DamagedShard when a document is lost and may not be skipped."""
        name = self._next_source()
        ids = np.full(self.length, PADDING, np.int32)
        spans: list[Span] = []
        filled = 0
        while filled < self.length:
            ready = self._hold_ready(name)
            left = [document.left for document in ready]
            piece = self._packing.next_piece(left, self.length - filled, self.length)
            if piece is None:
                break
            span, part = self._take(name, piece.number, piece.tokens)
            ids[filled : filled + span.tokens] = part
            filled += span.tokens
            spans.append(span)
        sample = self._made * self.lanes + self.number
        self._made += 1
        digest = row_digest(sample, ids, tuple(spans))
        return Row(sample, self.number, ids, tuple(spans), self._state(), digest)

    def _state(self) -> LaneState:
        opened: list[Opened] = []
        for name in self._sources:
            opened += self._to_open[name]
            opened += [document.place._replace(offset=document.offset) for document in self._open[name]]
        return LaneState(self._made, dict(self._at), tuple(opened), tuple(self._skipped))

    def _take(self, name: str, index: int, count: int) -> tuple[Span, np.ndarray]:
        """The next `count` tokens of an open document of the source."""
        document = self._open[name][index]
        offset = document.offset
        document.offset += count
        if not document.left:
            del self._open[name][index]
        self._at[name] = self._at[name]._replace(taken=self._at[name].taken + count)
        span = Span(name, document.epoch, document.shard, document.number, offset, count)
        return span, document.ids[offset : offset + count]

    def _next_source(self) -> str:
        """The source of the next row."""
        names = list(self._sources)
        tokens = [ahead + self._at[name].taken for name, ahead in zip(names, self._ahead, strict=True)]
        return names[furthest_behind(self._shares, tokens, self.length)]

    def _hold_ready(self, name: str) -> list[_Open]:
        """As many open documents of the source as the packing chooses from, the oldest first."""
        ready = self._open[name]
        ready += filter(None, map(self._read, self._to_open[name]))
        self._to_open[name] = []
        while len(ready) < self._packing.depth:
            ready.append(self._next_document(name))
        return ready

    def _next_document(self, name: str) -> _Open:
        """The next document of a source, slice after slice, for ever."""
        while True:
            at = self._at[name]
            if at.document >= len(self._slice(name, at.slice)[2]):
                self._at[name] = at._replace(slice=at.slice + 1, document=0)
                continue
            document = self._read(Opened(name, at.slice, at.document, 0))
            if document is not None:
                self._at[name] = at._replace(document=at.document + 1)
                return document

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
