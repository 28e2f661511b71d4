"""A manifest in little memory, for processes that read a few of very many shards."""

from collections.abc import Sequence
from typing import overload

import numpy as np

from megaroute.data.manifest import Manifest, ShardEntry


def compact(manifest: Manifest) -> Manifest:
    """The same manifest with shards that are parsed when they are asked for.

    A parsed entry takes 2 kB, and every reading process would hold all of them: 250 MB for 100,000 shards.  Their JSON
    takes a seventh, and can be sent to another process at once.
    """
    return manifest.model_copy(update={"shards": Catalog(manifest.shards)})


class Catalog(Sequence[ShardEntry]):
    """Entries of shards as JSON, each parsed when it is asked for."""

    def __init__(self, shards: Sequence[ShardEntry]) -> None:
        texts = [entry.model_dump_json().encode() for entry in shards]
        self._json = b"".join(texts)
        self._edges = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, number: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardEntry]: ...
    def __getitem__(self, number: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        position = range(len(self))[number]
        first, last = int(self._edges[position]), int(self._edges[position + 1])
        return ShardEntry.model_validate_json(self._json[first:last])
