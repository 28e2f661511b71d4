"""The stream of a replica: its share of the rows of all lanes, in their global order.

Rows are numbered g = 0, 1, 2, .. over the whole run, and row g belongs to lane g % V.  After g0 rows, replica r of D
makes rows g0 + r, g0 + r + D, ..  D divides V, so a lane stays with one replica until the next resume; D itself changes
nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from megaroute.common.errors import DataError
from megaroute.config.data import DataConfig
from megaroute.data.cursor import Cursor, data_identity
from megaroute.data.lanes import Lane, LaneState, Row
from megaroute.data.manifest import load_manifest
from megaroute.data.order import Order, cut_slices
from megaroute.data.shards import ShardSet
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.verify import check_same_tokenizer

SLICES_PER_LANE = 4  # fewer would let lanes drift apart by a large part of an epoch
VALID_SEED = 0


@dataclass(frozen=True)
class Batch:
    """Rows of one replica, in global order.  S = sequence length."""

    samples: np.ndarray
    """Global number of each row, int64 [n]."""
    ids: np.ndarray
    """Token ids, int32 [n, S + 1]: inputs ids[:, :-1], targets ids[:, 1:]."""
    starts: np.ndarray
    """Position in the row at which the document of each input starts, int32 [n, S]."""


class Stream:
    """Rows of replica `dp_rank` of `dp_size`, from the cursor on.  `open_stream` makes one from the configuration."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        tokenizer: Tokenizer,
        lanes: int,
        sequence_length: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cursor: Cursor | None = None,
    ) -> None:
        _check_replicas(lanes, dp_rank, dp_size)
        self._shards, self._order, self._tokenizer = shards, order, tokenizer
        self._num_lanes, self._length = lanes, sequence_length + 1
        self._dp_size = dp_size
        self._next = (cursor.samples if cursor else 0) + dp_rank
        mine = self._next % dp_size
        states = cursor.lanes if cursor else {}
        self._consumed: dict[int, LaneState] = {v: state for v, state in states.items() if v % dp_size == mine}
        self._lanes: dict[int, Lane] = {}

    def take(self, count: int) -> Batch:
        """The replica's next `count` rows; every replica must take as many, for together they are consecutive.

        Raises DataError when a shard is missing or damaged.
        """
        rows = [self.next_row() for _ in range(count)]
        return Batch(
            np.array([row.sample for row in rows], np.int64),
            np.stack([row.ids for row in rows]),
            np.stack([row.document_starts[:-1] for row in rows]),
        )

    def next_row(self) -> Row:
        """The replica's next row, with its documents; counts as consumed."""
        row = self._lane(self._next % self._num_lanes).next()
        assert row.sample == self._next, f"lane {row.lane} made row {row.sample}, expected {self._next}"
        self._consumed[row.lane] = row.state
        self._next += self._dp_size
        return row

    def cursor_part(self) -> dict[str, Any]:
        """States of this replica's lanes after the rows taken so far, for `merge_parts`; JSON can hold it."""
        return {"lanes": {str(lane): asdict(state) for lane, state in sorted(self._consumed.items())}}

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()

    def _lane(self, number: int) -> Lane:
        if number not in self._lanes:
            state = self._consumed.get(number)
            self._lanes[number] = Lane(
                number, self._num_lanes, self._length, self._order, self._shards.read, self._encode, state
            )
        return self._lanes[number]

    def _encode(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(text), self._tokenizer.eod]


def open_stream(
    data: DataConfig,
    split: Literal["train", "valid"],
    dp_rank: int = 0,
    dp_size: int = 1,
    cursor: Cursor | None = None,
) -> Stream:
    """Replica `dp_rank`'s stream over `data.train` or `data.valid`.

    The order of training text depends on data.seed and data.lanes; validation text always comes from the beginning, in
    an order that does not depend on the seed.  Raises DataError when the folder, the tokenizer or the cursor do not
    fit.
    """
    folder, key = (data.train, "data.train") if split == "train" else (data.valid, "data.valid")
    if folder is None:
        raise DataError("data.valid is not set, so there is no validation text; name a folder of shards")
    if split == "valid" and cursor is not None:
        raise ValueError("validation always starts at the beginning; it takes no cursor")
    manifest = load_manifest(folder, key)
    tokenizer = Tokenizer(data.tokenizer)
    check_same_tokenizer(tokenizer, manifest, folder, key)
    if cursor is not None:
        cursor.check(data_identity(data))
    slices = cut_slices([shard.documents for shard in manifest.shards], SLICES_PER_LANE * data.lanes)
    order = Order(slices, data.seed if split == "train" else VALID_SEED, split)
    shards = ShardSet(folder, manifest, key)
    return Stream(shards, order, tokenizer, data.lanes, data.sequence_length, dp_rank, dp_size, cursor)


def _check_replicas(lanes: int, dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not below dp_size {dp_size}")
    if lanes % dp_size:
        raise DataError(
            f"data.lanes: {lanes} lanes % {dp_size} data-parallel replicas = {lanes % dp_size}, must be 0, since a "
            f"lane is read by one replica; run with a number of replicas that divides {lanes}, or start a new run "
            f"with other lanes"
        )
