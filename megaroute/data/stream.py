"""The stream of a replica: its share of the rows of all lanes, in their global order.

Rows are numbered g = 0, 1, 2, .. over the whole run, and row g belongs to lane g % V.  After g0 rows, replica r of D
makes rows g0 + r, g0 + r + D, .., and worker w of W every W-th of these.  D * W divides V, so a lane stays with one
worker until the next resume; D and W themselves change nothing.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np

from megaroute.common.errors import DataError
from megaroute.config.data import DataConfig, SourceConfig
from megaroute.data.catalog import compact
from megaroute.data.cursor import Cursor
from megaroute.data.identity import identity_of
from megaroute.data.maker import Recipe, RowMaker
from megaroute.data.manifest import load_manifest
from megaroute.data.packing import build_packing
from megaroute.data.rows import DIGEST_BITS, LaneState, Row
from megaroute.data.sources import SourceRecipe
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.verify import check_same_tokenizer
from megaroute.data.workers import RowWorkers

VALID = "valid"
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
    targets: np.ndarray
    """Inputs of each row that have a target, int64 [n]: the first ones; S but for rows that end in padding."""
    digest: int
    """Sum of the rows' digests modulo 2^128."""
    tokens: Mapping[str, int]
    """Tokens of the rows by source; together S + 1 a row, less its padding."""
    skipped: int
    """Slices given up for damage on the way to these rows."""
    wait_s: float
    """Seconds that `take` took: what the step waited for its data."""


class Stream:
    """Rows of replica `dp_rank` of `dp_size`, from the cursor on.  `open_stream` makes one from the configuration."""

    def __init__(
        self, data: DataConfig, recipe: Recipe, identity: Mapping[str, Any], dp_rank: int, dp_size: int, cursor: Cursor
    ) -> None:
        self.identity = identity
        """What the stream is a function of, for the cursor."""
        self.changes = cursor.changes
        """What was changed on purpose so far, for the cursor."""
        self._step = dp_size
        self._next = first = cursor.samples + dp_rank
        mine = {v: state for v, state in cursor.lanes.items() if (v - first) % dp_size == 0}
        self._consumed: dict[int, LaneState] = mine
        self._rows: RowMaker | RowWorkers
        if data.workers:
            options = {"count": data.workers, "prefetch": data.prefetch}
            self._rows = RowWorkers(recipe, first, dp_size, mine, timeout_s=data.worker_timeout_s, **options)
        else:
            self._rows = RowMaker(recipe, first, dp_size, mine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, count: int) -> Batch:
        """The replica's next `count` rows; every replica must take as many, for together they are consecutive.

        Raises DataError when a shard is missing or damaged, WorkerError when a worker is lost or stalls.
        """
        began = time.perf_counter()
        skipped = self._skipped()
        rows = [self.next_row() for _ in range(count)]
        tokens: Counter[str] = Counter()
        for row in rows:
            for span in row.spans:
                tokens[span.source] += span.tokens
        return Batch(
            samples=np.array([row.sample for row in rows], np.int64),
            ids=np.stack([row.ids for row in rows]),
            starts=np.stack([row.document_starts[:-1] for row in rows]),
            targets=np.array([row.filled - 1 for row in rows], np.int64),
            digest=sum(row.digest for row in rows) % 2**DIGEST_BITS,
            tokens=tokens,
            skipped=self._skipped() - skipped,
            wait_s=time.perf_counter() - began,
        )

    def next_row(self) -> Row:
        """The replica's next row, with its documents; counts as consumed."""
        row = self._rows.next_row()
        assert row.sample == self._next, f"row {row.sample} came where {self._next} was expected"
        self._consumed[row.lane] = row.state
        self._next += self._step
        return row

    @property
    def samples(self) -> int:
        """Rows before the next one of this replica, of all replicas together."""
        return self._next

    def cursor_part(self) -> dict[str, Any]:
        """States of this replica's lanes after the rows taken so far, for `merge_parts`; JSON can hold it."""
        return {"lanes": {str(lane): asdict(state) for lane, state in sorted(self._consumed.items())}}

    def close(self) -> None:
        """End the workers and close the shards.  Without workers a later row opens the shards again."""
        self._rows.close()

    def _skipped(self) -> int:
        return sum(len(state.skipped) for state in self._consumed.values())


def open_stream(
    data: DataConfig,
    split: Literal["train", "valid"],
    dp_rank: int = 0,
    dp_size: int = 1,
    cursor: Cursor | None = None,
) -> Stream:
    """Replica `dp_rank`'s stream over `data.train` or `data.valid`.

    The order of training text depends on data.seed and data.lanes; validation text always comes from the beginning, in
    an order that does not depend on the seed, without workers.  Raises DataError when a folder, the tokenizer or the
    cursor do not fit.
    """
    if split == VALID:
        data = _for_validation(data)
        if cursor is not None:
            raise ValueError("validation always starts at the beginning; it takes no cursor")
    _check_replicas(data.lanes, data.workers, dp_rank, dp_size)
    tokenizer = Tokenizer(data.tokenizer)
    sources, manifests = [], {}
    for name, key, source in _named(data, split):
        manifest = load_manifest(source.path, key, data.remote)
        check_same_tokenizer(tokenizer, manifest, source.path, key)
        manifests[name] = manifest.fingerprint
        counts = np.array([entry.documents for entry in manifest.shards], np.int64)
        place = (source.weight, source.path, compact(manifest), counts)
        sources.append(
            SourceRecipe(name, key, *place, seed=data.seed, lanes=data.lanes, remote=data.remote, cache=data.cache)
        )
    identity = identity_of(data, manifests, tokenizer.fingerprint)
    cursor = cursor.continued(identity, data.allow_change) if cursor else Cursor(0, identity, {})
    budget = data.skip_budget if data.on_damage == "skip" else None
    rows = (data.lanes, data.sequence_length + 1, build_packing(data))
    recipe = Recipe(tuple(sources), data.tokenizer, *rows, budget, data.max_open_files)
    return Stream(data, recipe, identity, dp_rank, dp_size, cursor)


def _named(data: DataConfig, split: str) -> list[tuple[str, str, SourceConfig]]:
    """(name, dotted key, source) of each source."""
    if split == VALID:
        return [(VALID, "data.valid", source) for source in data.sources.values()]
    return [(name, key, source) for (name, source), key in zip(data.sources.items(), data.folders, strict=False)]


def _for_validation(data: DataConfig) -> DataConfig:
    if data.valid is None:
        raise DataError("data.valid is not set, so there is no validation text; name a folder of shards")
    # It must be the same rows for every run, so whatever may differ between runs is fixed.
    return data.model_copy(
        update={"train": data.valid, "valid": None, "seed": VALID_SEED, "workers": 0, "on_damage": "fail"}
    )


def _check_replicas(lanes: int, workers: int, dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank {dp_rank} is not below dp_size {dp_size}")
    if lanes % dp_size:
        raise DataError(
            f"data.lanes: {lanes} lanes % {dp_size} data-parallel replicas = {lanes % dp_size}, must be 0, since a "
            f"lane is read by one replica; run with a number of replicas that divides {lanes}, or start a new run "
            f"with other lanes"
        )
    if workers and lanes // dp_size % workers:
        raise DataError(
            f"data.workers: {lanes // dp_size} lanes of a replica % {workers} workers = {lanes // dp_size % workers}, "
            f"must be 0, since a lane is read by one worker; choose a number of workers that divides it"
        )
