"""Tar shards with a byte index: reading any document by one seek.

webdataset imports torch, which takes seconds; so it is imported by the functions that need it.
"""

import errno
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from megaroute.common.errors import DamagedShard, DataError
from megaroute.config.data import CacheConfig, RemoteConfig
from megaroute.data.cache import CacheFull
from megaroute.data.manifest import TOKEN_MEMBERS, Manifest, ShardEntry
from megaroute.data.members import NOTES, document_members
from megaroute.data.remote import location
from megaroute.data.retry import is_transient, retry
from megaroute.data.store import REMEDY, Store, open_store, unreadable
from megaroute.data.tokenizer import Tokenizer

T = TypeVar("T")

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
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            if not member.isreg() or key is None or NOTES.match(member.name):
                continue
            if key != last_key:
                offsets.append(member.offset if offsets else 0)  # what lies before the first goes with it
                last_key = key
    return np.array([*offsets, end], dtype=np.int64)


def load_index(folder: Path, entry: ShardEntry, key: str) -> np.ndarray:
    """The byte index of a local shard, int64 [documents + 1].  Raises DamagedShard when it cannot belong to it."""
    what, shard = f"{key}: index {folder / entry.index}", str(folder / entry.name)
    return _load_index(open_store(folder, key), entry, what, shard)


def _load_index(store: Store, entry: ShardEntry, what: str, shard: str) -> np.ndarray:
    try:
        with store.open_index(entry) as file:
            index = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedShard(f"{what} cannot be read ({error}); copy the folder again", shard=shard) from error
    fits = index.shape == (entry.documents + 1,) and index.dtype == np.int64
    if not fits or index[0] != 0 or index[-1] > entry.bytes or np.any(np.diff(index) <= 0):
        raise DamagedShard(
            f"{what} does not fit its shard of {entry.documents} documents and {entry.bytes} bytes, so documents "
            f"would be cut at wrong places; copy the folder again",
            shard=shard,
        )
    return index


class ShardSet:
    """Documents of a folder of shards, by shard number and document number; keeps `open_files` shards open.

    The folder may be a URL; its files are then fetched into the cache as they are needed.  Every method that reads
    raises DamagedShard, with shard, document and offset, for a shard that is missing, cut off, of another size or
    checksum than the manifest says, or damaged in that document; passing errors are tried again first, and what is no
    damage (a server out of reach, a full disk, permissions) is a plain DataError.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Manifest,
        key: str = "data.train",
        open_files: int | None = None,
        remote: RemoteConfig | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        self.folder, self.manifest, self._key, self._limit = folder, manifest, key, open_files or OPEN_FILES
        self._remote = remote or RemoteConfig()
        self._store = open_store(folder, key, remote, cache)
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()  # least recently used first
        self._files: OrderedDict[int, io.BufferedReader] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, shard: int, document: int) -> str:
        """Text of one document."""
        place = self.manifest.text
        if place is None:
            raise DataError(
                f"{self._key}: {self.folder} holds token ids without the texts; read those, or prepare it again with "
                f"--tokenize beside"
            )
        return self._parsed(shard, document, lambda members: member_text(members, place))

    def read_tokens(self, shard: int, document: int) -> np.ndarray:
        """Stored token ids of one document, without end-of-document, int32 [n]: what its tokenizer gives for its text.

        The manifest's `token_type` says whether there are any, its `tokenizer` whose they are.
        """
        stored = self.manifest.token_type
        assert stored is not None, f"{self.folder} has no token ids"
        kind = np.dtype(stored).newbyteorder("<")
        return self._parsed(
            shard, document, lambda members: np.frombuffer(members[TOKEN_MEMBERS[stored]], kind).astype(np.int32)
        )

    def encoded(self, shard: int, document: int, tokenizer: Tokenizer) -> np.ndarray:
        """Token ids of one document with end-of-document, int32 [n + 1]: the stored ones, or made from the text now.

        `check_same_tokenizer` must have passed.
        """
        if self.manifest.token_type is not None:
            return np.append(self.read_tokens(shard, document), np.int32(tokenizer.eod))
        return np.array([*tokenizer.encode(self.read(shard, document)), tokenizer.eod], dtype=np.int32)

    def describe(self, shard: int, document: int) -> Any:
        """What is stored of a document beside its text: `{"id": .., "metadata": ..}` in our shards; None if nothing."""
        return self._parsed(shard, document, lambda members: json.loads(members["json"]) if "json" in members else None)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _parsed(self, shard: int, document: int, parse: Callable[[dict[str, bytes]], T]) -> T:
        """`parse` of the members of a document."""
        index = self._index(shard)
        start, end = int(index[document]), int(index[document + 1])
        path = location(self.folder, self.manifest.shards[shard].name)
        what = f"{self._key}: document {document} of {path}"
        try:
            raw = retry(lambda: self._bytes(shard, start, end), self._remote, is_transient, what)
            return parse(document_members(raw))
        except OSError as error:
            if error.errno not in (None, errno.EIO):
                raise unreadable(what, error, path) from error
            reason: Exception = error
        except (EOFError, tarfile.TarError, ValueError, KeyError) as error:
            reason = error
        raise DamagedShard(
            f"{what} cannot be read at byte {start} ({reason}); the shard is damaged: {REMEDY}",
            shard=path,
            document=document,
            offset=start,
        ) from reason

    def _bytes(self, shard: int, start: int, end: int) -> bytes:
        try:
            raw = os.pread(self._file(shard).fileno(), end - start, start)
        except OSError:
            if shard in self._files:
                self._files.pop(shard).close()  # a stale handle never recovers
            raise
        if len(raw) < end - start:
            raise EOFError(f"the file ends {end - start - len(raw)} bytes early")
        return raw

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indexes:
            if len(self._indexes) >= self._limit:
                self._indexes.popitem(last=False)
            entry = self.manifest.shards[shard]
            what = f"{self._key}: index {location(self.folder, entry.index)}"
            # In memory, since a map would hold its file open; few, since an index is up to a megabyte.
            self._indexes[shard] = _load_index(self._store, entry, what, location(self.folder, entry.name))
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _file(self, shard: int) -> io.BufferedReader:
        if shard not in self._files:
            if len(self._files) >= max(1, self._limit - 1):  # one is for an index that is read
                self._files.popitem(last=False)[1].close()
            entry = self.manifest.shards[shard]
            try:
                self._files[shard] = self._store.open_shard(entry)
            except CacheFull:
                self.close()  # what we have open cannot make room
                self._files[shard] = self._store.open_shard(entry)
        self._files.move_to_end(shard)
        return self._files[shard]


def member_text(members: Mapping[str, bytes], place: str) -> str:
    """The text at `place`: an extension, or `json.FIELD`.  Raises KeyError or ValueError where there is none."""
    if place in members or not place.startswith("json."):
        return members[place].decode()
    text = json.loads(members["json"])[place.removeprefix("json.")]
    if not isinstance(text, str):
        raise ValueError(f"{place!r} is no string")
    return text
