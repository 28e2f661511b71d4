"""Sources of a mixture: shards, their order, and their documents as tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaroute.config.data import CacheConfig, RemoteConfig
from megaroute.data.manifest import Manifest
from megaroute.data.order import Order, cut_slices
from megaroute.data.shards import ShardSet
from megaroute.data.tokenizer import Tokenizer

SLICES_PER_LANE = 4  # fewer would let lanes drift apart by a large part of an epoch


@dataclass(frozen=True)
class SourceRecipe:
    """What a process needs to read a source; can be sent to another one."""

    name: str
    """Name of the source; its order depends on it."""
    key: str
    """Dotted key that named the folder, for error texts."""
    weight: float
    """Share of the tokens, relative to the other sources."""
    folder: Path | str
    """Where the shards are: a path or a URL."""
    manifest: Manifest
    """Which shards there are, compact where there are many."""
    documents: np.ndarray
    """Documents of each shard, int64 [shards]."""
    seed: int
    """Seed of the order of documents."""
    lanes: int
    """Lanes that share the slices."""
    remote: RemoteConfig
    """How files are fetched."""
    cache: CacheConfig
    """Where copies of remote ones are kept."""

    def open(self, tokenizer: Tokenizer, open_files: int) -> "Source":
        """The source in this process, with at most `open_files` shards open."""
        slices = cut_slices(self.documents, SLICES_PER_LANE * self.lanes)
        shards = ShardSet(self.folder, self.manifest, self.key, open_files, self.remote, self.cache)
        return Source(self.name, self.weight, Order(slices, self.seed, self.name), shards, tokenizer)


class Source:
    """Documents of one source as tokens, in an order that depends on seed and name."""

    def __init__(self, name: str, weight: float, order: Order, shards: ShardSet, tokenizer: Tokenizer) -> None:
        self.name, self.weight, self.order = name, weight, order
        self._shards, self._tokenizer = shards, tokenizer

    def ids(self, shard: int, document: int) -> np.ndarray:
        """Token ids, int32, of one document, the last one end-of-document.

        Raises DamagedShard when the shard is missing or damaged there, DataError when it cannot be read otherwise.
        """
        return self._shards.encoded(shard, document, self._tokenizer)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        self._shards.close()
