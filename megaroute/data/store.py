"""Where the files of a folder of shards come from: a local folder, or a remote one by way of the cache."""

import errno
import os
from io import BufferedReader
from pathlib import Path
from typing import Protocol

from megaroute.common.errors import DamagedShard, DataError
from megaroute.config.data import CacheConfig, RemoteConfig, is_remote
from megaroute.data.cache import ShardCache
from megaroute.data.manifest import ShardEntry
from megaroute.data.remote import url_of
from megaroute.data.retry import is_transient, retry

DAMAGE = {errno.ENOENT, errno.EIO, errno.ENOTDIR}
REMEDY = "copy it again or write the folder anew with tools/make_shards.py"


class Store(Protocol):
    """Opens the files of one folder.

    Both methods raise DamagedShard when a file is missing or is not the one that the manifest lists, and DataError when
    it cannot be read for another reason.
    """

    def open_shard(self, entry: ShardEntry) -> BufferedReader:
        """The tar of a shard, of the right size."""

    def open_index(self, entry: ShardEntry) -> BufferedReader:
        """Its index."""


class LocalStore:
    """A folder on a file system, whose passing errors are tried again.  `key` is the setting that named it."""

    def __init__(self, folder: Path, key: str, remote: RemoteConfig) -> None:
        self._folder, self._key, self._remote = folder, key, remote

    def open_shard(self, entry: ShardEntry) -> BufferedReader:
        file = self._open(entry, entry.name)
        try:
            _compare_size(self._folder / entry.name, os.fstat(file.fileno()).st_size, entry, self._key)
        except DataError:
            file.close()
            raise
        return file

    def open_index(self, entry: ShardEntry) -> BufferedReader:
        return self._open(entry, entry.index)

    def _open(self, entry: ShardEntry, name: str) -> BufferedReader:
        path = self._folder / name
        try:
            return retry(lambda: path.open("rb"), self._remote, is_transient, str(path))
        except OSError as error:
            kind = "shard" if name == entry.name else "index"
            raise unreadable(f"{self._key}: {kind} {path}", error, str(self._folder / entry.name)) from error


class RemoteStore:
    """A folder at a URL or behind a pipe."""

    def __init__(self, folder: str, key: str, remote: RemoteConfig, cache: CacheConfig) -> None:
        self._folder, self._cache = folder, ShardCache(cache, remote, key)

    def open_shard(self, entry: ShardEntry) -> BufferedReader:
        return self._cache.open(url_of(self._folder, entry.name), entry.sha256, entry.bytes)

    def open_index(self, entry: ShardEntry) -> BufferedReader:
        return self._cache.open(url_of(self._folder, entry.index), entry.index_sha256)


def open_store(
    folder: str | Path, key: str, remote: RemoteConfig | None = None, cache: CacheConfig | None = None
) -> Store:
    """The store of a folder, which may be a URL; `key` is the setting that named it."""
    if is_remote(folder):
        return RemoteStore(str(folder), key, remote or RemoteConfig(), cache or CacheConfig())
    return LocalStore(Path(folder), key, remote or RemoteConfig())


def unreadable(what: str, error: OSError, shard: str) -> DataError:
    """The error for a file that the system will not read: damage, or something else that a user can mend."""
    if error.errno in DAMAGE:
        return DamagedShard(
            f"{what} is listed in the manifest but cannot be read ({error.strerror}); {REMEDY}", shard=shard
        )
    return DataError(f"{what} cannot be read ({error.strerror}); see to its permissions and the system's limits")


def check_size(folder: Path, entry: ShardEntry, key: str) -> None:
    """Raise DamagedShard unless the shard is there and as long as the manifest says; `key` named its folder."""
    path = folder / entry.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(f"{key}: shard {path}", error, str(path)) from error
    _compare_size(path, size, entry, key)


def _compare_size(path: Path, size: int, entry: ShardEntry, key: str) -> None:
    if size != entry.bytes:
        raise DamagedShard(
            f"{key}: shard {path} has {size} bytes, its manifest says {entry.bytes}; it is cut off or was changed, "
            f"and text would be lost or repeated: {REMEDY}",
            shard=str(path),
        )
