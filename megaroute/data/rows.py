"""What a lane makes: rows of tokens that know which documents they are of, and the state to go on from."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from pydantic import NonNegativeInt

DIGEST_BITS = 128
PADDING = 0
"""Token id where a row is empty; nothing is learned from it, and no token attends to it."""


class Position(NamedTuple):
    """Where a lane stands in one source."""

    slice: NonNegativeInt = 0
    """Slices that the lane has finished."""
    document: NonNegativeInt = 0
    """Documents begun in the slice at hand."""
    taken: NonNegativeInt = 0
    """Tokens packed since the mixture was last changed; the shares are held by them."""


class Opened(NamedTuple):
    """A document that is begun, or held ready, and not used up; it is read and tokenised again on resume."""

    source: str
    """Name of its source."""
    slice: NonNegativeInt
    """The lane's slice that it lies in."""
    document: NonNegativeInt
    """Its place in the reading order of the slice."""
    offset: NonNegativeInt
    """Tokens used."""


class Skip(NamedTuple):
    """The rest of a slice that a lane gave up because a document could not be read."""

    source: str
    """Name of the source."""
    slice: NonNegativeInt
    """The lane's slice."""
    document: NonNegativeInt
    """First document given up, as a place in the reading order of the slice."""


@dataclass(frozen=True)
class LaneState:
    """Where a lane goes on: all it needs to make its next row, and nothing about ranks or processes."""

    made: NonNegativeInt = 0
    """Rows made: the lane's next row is g = made * V + v."""
    sources: Mapping[str, Position] = field(default_factory=dict)
    """Position in each source by name; a source that is not there begins."""
    open: tuple[Opened, ...] = ()
    """Documents at hand, in the order in which they were opened."""
    skipped: tuple[Skip, ...] = ()
    """What was given up, in order."""


class Span(NamedTuple):
    """Consecutive tokens of one document inside a row."""

    source: str
    """Name of the source."""
    epoch: int
    """Pass over the source, from 0."""
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
    """Token ids, int32 [S + 1], PADDING behind the last document.  Rows do not overlap."""
    spans: tuple[Span, ...]
    """Documents of the row, in order; their tokens add up to S + 1, or to less where the row ends in padding."""
    state: LaneState
    """The lane's state after this row; a run that consumed the row goes on from here."""
    digest: int
    """`row_digest` of the row."""

    @property
    def filled(self) -> int:
        """Tokens before the padding."""
        return sum(span.tokens for span in self.spans)

    @property
    def starts(self) -> tuple[int, ...]:
        """Offsets in the row at which a document begins."""
        edges = np.cumsum([0, *(span.tokens for span in self.spans)])
        return tuple(int(edge) for edge, span in zip(edges, self.spans, strict=False) if span.offset == 0)

    @property
    def document_starts(self) -> np.ndarray:
        """Where in the row the document of each token starts, int32 [S + 1]; 0 for one that started in an earlier row.

        An end-of-document token belongs to the document that it ends; padding is a document by itself.
        """
        starts = np.empty(len(self.ids), np.int32)
        at = 0
        for span in self.spans:
            starts[at : at + span.tokens] = at
            at += span.tokens
        starts[at:] = at
        return starts


def row_digest(sample: int, ids: np.ndarray, spans: tuple[Span, ...]) -> int:
    """128-bit checksum of a row: its number, which tokens of which documents it holds, and the tokens themselves."""
    digest = blake2b(struct.pack("<q", sample), digest_size=DIGEST_BITS // 8)
    for span in spans:
        digest.update(span.source.encode() + struct.pack("<5q", *span[1:]))
    digest.update(np.ascontiguousarray(ids, "<i4").data)
    return int.from_bytes(digest.digest(), "little")
