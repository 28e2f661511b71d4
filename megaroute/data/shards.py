"""Tar shards with a byte index: reading any document by one seek.

webdataset imports torch, which takes seconds; so it is imported by the functions that need it.
"""

import io
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megaroute.common.errors import DataError
from megaroute.data.manifest import Manifest, ShardEntry

BLOCK = 512  # tar pads every member to this many bytes
OPEN_FILES = 32


def build_index(path: str | Path) -> np.ndarray:
    """Byte offsets of the documents of a tar, int64 [documents + 1]; members that share a key are one document."""
    from webdataset.tariterators import base_plus_ext

    offsets: list[int] = []
    last_key, end = None, 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _ = base_plus_ext(member.name)
            if key != last_key:
                offsets.append(member.offset)
                last_key = key
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
    return np.array([*offsets, end], dtype=np.int64)


def check_size(folder: Path, entry: ShardEntry, key: str) -> None:
    """Raise DataError unless the shard is there and as long as the manifest says; `key` named its folder."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{key}: shard {path} is listed in the manifest but cannot be read ({error.strerror}); copy it again"
        ) from error
    if size != entry.bytes:
        raise DataError(
            f"{key}: shard {path} has {size} bytes, its manifest says {entry.bytes}; it is cut off or was changed, "
            f"and text would be lost or repeated: copy it again or write the folder anew with tools/make_shards.py"
        )


def load_index(folder: Path, entry: ShardEntry, key: str) -> np.ndarray:
    """The shard's byte index, int64 [documents + 1].  Raises DataError when it cannot belong to the shard."""
    path = folder / entry.index
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{key}: index {path} cannot be read ({error}); copy the folder again") from error
    fits = index.shape == (entry.documents + 1,) and index.dtype == np.int64
    if not fits or index[0] != 0 or index[-1] > entry.bytes or np.any(np.diff(index) <= 0):
        raise DataError(
            f"{key}: index {path} does not fit its shard of {entry.documents} documents and {entry.bytes} bytes, "
            f"so documents would be cut at wrong places; copy the folder again"
        )
    return index


class ShardSet:
    """Documents of a folder of local shards, by shard number and document number."""

    def __init__(self, folder: Path, manifest: Manifest, key: str = "data.train") -> None:
        self.folder, self.manifest, self._key = folder, manifest, key
        self._indexes: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, io.BufferedReader] = OrderedDict()  # least recently used first

    def read(self, shard: int, document: int) -> str:
        """Text of one document.  Raises DataError when the shard is missing, of another size, or damaged there."""
        index = self._index(shard)
        start, end = int(index[document]), int(index[document + 1])
        where = f"{self._key}: document {document} of {self.folder / self.manifest.shards[shard].name}"
        try:
            raw = os.pread(self._file(shard).fileno(), end - start, start)
            return _parse(raw)
        except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
            raise DataError(f"{where} cannot be read ({error}); the shard is damaged: copy it again") from error

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indexes:
            entry = self.manifest.shards[shard]
            check_size(self.folder, entry, self._key)
            self._indexes[shard] = load_index(self.folder, entry, self._key)
        return self._indexes[shard]

    def _file(self, shard: int) -> io.BufferedReader:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = (self.folder / self.manifest.shards[shard].name).open("rb")
        self._files.move_to_end(shard)
        return self._files[shard]


def _parse(raw: bytes) -> str:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = list(group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(raw)}])))
    if len(samples) != 1:
        raise ValueError(f"{len(samples)} documents where 1 should be")
    return samples[0]["txt"].decode()
