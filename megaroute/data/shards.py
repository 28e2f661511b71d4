"""Tar shards with a byte index: writing them the same way each time, reading any document by one seek.

webdataset imports torch, which takes seconds; so it is imported by the functions that need it.
"""

import io
import os
import tarfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np

from megaroute.common.errors import DataError
from megaroute.common.files import sha256_file
from megaroute.data.documents import Document
from megaroute.data.manifest import Manifest, ShardEntry
from megaroute.data.members import member

BLOCK = 512  # tar pads every member to this many bytes
OPEN_FILES = 32
MAX_DOCUMENTS = 100_000  # of one shard: keeps its index under a megabyte


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


class ShardFolderWriter:
    """Writes documents into numbered shards of an empty folder.

    The bytes written depend on the documents and on `shard_bytes` (UTF-8 text of a shard) alone.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        from webdataset.writer import ShardWriter

        self.folder = folder
        self._entries: list[ShardEntry] = []
        self._documents = self._text_bytes = self._tokens = 0
        self._counted = True
        pattern = str(folder.resolve()).replace("%", "%%") + "/shard-%06d.tar"
        self._writer = ShardWriter(
            pattern, maxcount=MAX_DOCUMENTS, maxsize=shard_bytes, post=self._finish_shard, verbose=0, mtime=0
        )

    def write(self, document: Document, tokens: int | None = None) -> None:
        """Append one document; `tokens` is its length with the end-of-document token, if known."""
        text = document.text.encode()
        self._writer.write({"__key__": f"{self._writer.total:09d}", "txt": text, "json": {"id": document.id}})
        # The writer closes a full shard at the start of write(), so these sums belong to the shard that is open now.
        self._documents += 1
        self._text_bytes += len(text)
        self._tokens += tokens or 0
        self._counted = tokens is not None

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; the entries of all shards."""
        self._writer.finish()
        return self._entries

    def discard(self) -> None:
        """Close a shard that is still open, for a folder that will be removed; nothing happens after close()."""
        self._writer.post = None
        with suppress(OSError):
            self._writer.finish()

    def _finish_shard(self, name: str) -> None:
        if not self._documents:  # closed without a document
            os.unlink(name)
            return
        path = Path(name)
        index_path = path.with_suffix(".index.npy")
        index = build_index(path)
        assert len(index) == self._documents + 1, f"{path}: {len(index) - 1} documents found, {self._documents} written"
        np.save(index_path, index)
        self._entries.append(
            ShardEntry(
                name=path.name,
                bytes=path.stat().st_size,
                sha256=sha256_file(path),
                index=index_path.name,
                index_sha256=sha256_file(index_path),
                documents=self._documents,
                text_bytes=self._text_bytes,
                tokens=self._tokens if self._counted else None,
            )
        )
        self._documents = self._text_bytes = self._tokens = 0


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
    """Documents of a folder of local shards, by shard number and document number; keeps `open_files` of them open."""

    def __init__(
        self, folder: Path, manifest: Manifest, key: str = "data.train", open_files: int | None = None
    ) -> None:
        self.folder, self.manifest, self._key, self._limit = folder, manifest, key, open_files or OPEN_FILES
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()  # least recently used first
        self._files: OrderedDict[int, io.BufferedReader] = OrderedDict()  # least recently used first

    def read(self, shard: int, document: int) -> str:
        """Text of one document.  Raises DataError when the shard is missing, of another size, or damaged there."""
        index = self._index(shard)
        start, end = int(index[document]), int(index[document + 1])
        where = f"{self._key}: document {document} of {self.folder / self.manifest.shards[shard].name}"
        try:
            raw = os.pread(self._file(shard).fileno(), end - start, start)
            return member(raw, ".txt").decode()
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
            # A copy in memory, since a map would hold its file open; few, since an index is up to a megabyte.
            self._indexes[shard] = np.array(load_index(self.folder, entry, self._key))
            if len(self._indexes) > self._limit:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _file(self, shard: int) -> io.BufferedReader:
        if shard not in self._files:
            if len(self._files) >= self._limit:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = (self.folder / self.manifest.shards[shard].name).open("rb")
        self._files.move_to_end(shard)
        return self._files[shard]
