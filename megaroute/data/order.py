"""The order of documents, as a function of the seed: nothing is drawn, so nothing has to be saved."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def permutation(count: int, *key: object) -> np.ndarray:
    """A permutation of 0 .. count - 1, int64 [count], that depends on `key` alone.

    It sorts raw words of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), whose output
    numpy promises never to change; `Generator.permutation` carries no such promise.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return np.argsort(words, kind="stable")


def cut_slices(documents: Sequence[int] | np.ndarray, at_least: int) -> np.ndarray:
    """Cut shards of `documents` documents into slices: int64 [slices, 3] of (shard, first document, last + 1).

    A slice lies in one shard.  There are `at_least` slices or more, except where there are fewer documents than that.
    """
    counts = np.asarray(documents, dtype=np.int64)
    largest = max(1, int(counts.sum()) // at_least)
    pieces = -(-counts // largest)
    shard = np.repeat(np.arange(len(counts)), pieces)
    rank = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    edges = np.stack([rank, rank + 1]) * counts[shard] // pieces[shard]
    return np.stack([shard, *edges], axis=1)


class Order:
    """An endless sequence of slices, epoch after epoch, and the order of documents inside each.

    Place p of the sequence belongs to epoch p // slices.  Every epoch has every slice once, in an order of its own.
    """

    def __init__(self, slices: np.ndarray, seed: int, name: str) -> None:
        self.slices = slices
        self._key = (seed, name)
        self._epoch = lru_cache(maxsize=4)(lambda epoch: permutation(len(slices), *self._key, epoch))

    def documents(self, place: int) -> tuple[int, int, np.ndarray]:
        """(epoch, shard, document numbers in the shard in reading order, int64) of the slice at `place`."""
        epoch, rank = divmod(place, len(self.slices))
        number = int(self._epoch(epoch)[rank])
        shard, first, last = (int(value) for value in self.slices[number])
        return epoch, shard, first + permutation(last - first, *self._key, epoch, number)
