"""Copies of remote files on a disk of the node, each fetched once for all its processes.

A file is named by its sha256 and checked against it before it gets that name.  Locks are flock on the files
themselves, so the kernel frees those of a process that dies:

    NAME.part   exclusive: the holder fetches; others wait until the file has its final name
    NAME        shared: in use, not to be removed
    .lock       exclusive: counting bytes and removing files
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from megaroute.common.errors import DamagedShard, DataError
from megaroute.config.data import CacheConfig, RemoteConfig
from megaroute.data.remote import Gone, chunks, describe, may_pass, unreachable
from megaroute.data.retry import retry

POLL_S = 0.05
PATIENCE_S = 10.0  # beyond the longest silence of a process that fetches
PART = ".part"


class CacheFull(DataError):
    """No room can be made, since what is there is in use."""


class _WrongBytes(Exception):
    """What arrived is not what the manifest says."""


class ShardCache:
    """Files by sha256 in `data.cache.directory`.  `key` names the setting in whose name files are fetched."""

    def __init__(self, cache: CacheConfig, remote: RemoteConfig, key: str) -> None:
        default = Path(tempfile.gettempdir()) / f"megaroute-cache-{os.getuid()}"
        self.directory = cache.directory or default
        self._max_bytes, self._remote, self._key = cache.max_bytes, remote, key

    def open(self, url: str, sha256: str, size: int | None = None) -> BufferedReader:
        """The file, fetched if it is not there; it stays until the reader is closed.  `size` in bytes, if known.

        Raises DamagedShard when there is no such file or its bytes are wrong after all tries; DataError when it cannot
        be fetched, when the disk is full, and CacheFull when it is full of files in use.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / sha256
            while True:
                file = self._open_there(path, size)
                if file is not None:
                    return file
                with self._part(path) as part:
                    if part is not None:
                        self._fetch(part, url, sha256, size)
                        os.replace(f"{path}{PART}", path)
        except OSError as error:
            raise DataError(
                f"data.cache.directory: {self.directory} cannot take {url} ({error.strerror}), so its text cannot be "
                f"read; make room, lower data.cache.max_bytes, or name another folder"
            ) from error

    def _open_there(self, path: Path, size: int | None) -> BufferedReader | None:
        """The file if it is there, marked as in use and as used now."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if size is not None and status.st_size != size and status.st_nlink:
            path.unlink(missing_ok=True)  # cut off, as after a crash of the node
        elif status.st_nlink:
            os.utime(file.fileno())
            return file
        file.close()
        return None

    @contextlib.contextmanager
    def _part(self, path: Path) -> Iterator[int | None]:
        """The locked file to fetch into; None when another process finished it meanwhile."""
        part = path.with_name(path.name + PART)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._wait_for(descriptor, part)
            there = path.exists() or not _is_same(descriptor, part)
            yield None if there else descriptor
        except BaseException:
            if _is_same(descriptor, part):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int, part: Path) -> None:
        """Lock the file, or see it finished, for as long as whoever has it makes progress.

        Finished it is the same file under its final name, and its readers hold a lock on it: nobody may wait for that.
        """
        longest = self._remote.connect_s + self._remote.stall_s + self._remote.max_backoff_s + PATIENCE_S
        changed, since = -1, time.monotonic()
        while not _try_lock(descriptor) and _is_same(descriptor, part):
            now = os.fstat(descriptor).st_mtime_ns
            if now != changed:
                changed, since = now, time.monotonic()
            elif time.monotonic() - since > longest:
                raise DataError(
                    f"{self._key}: another process has been fetching {part} for {longest:g} s without progress, so "
                    f"this one waits in vain; end that process, or remove the file"
                )
            time.sleep(POLL_S)

    def _fetch(self, part: int, url: str, sha256: str, size: int | None) -> None:
        try:
            retry(lambda: self._fetch_once(part, url, sha256, size), self._remote, _may_pass, url)
        except (DataError, _Unwritable):
            raise
        except (Gone, _WrongBytes) as error:
            raise DamagedShard(
                f"{self._key}: {url} is gone or damaged: {describe(error)}, after {self._remote.attempts} tries; "
                f"put a good copy there, or write the folder anew with tools/make_shards.py",
                shard=url,
            ) from error
        except Exception as error:
            raise unreachable(url, error, self._remote, self._key) from error

    def _fetch_once(self, part: int, url: str, sha256: str, size: int | None) -> None:
        if size is not None:
            self._make_room(part, size)
        digest, count = hashlib.sha256(), 0
        for chunk in chunks(url, self._remote):
            if size is not None and count + len(chunk) > size:
                raise _WrongBytes(f"it has more than the {size} bytes that its manifest says")
            _write(part, chunk, count)
            digest.update(chunk)
            count += len(chunk)
        if size is not None and count != size:
            raise _WrongBytes(f"it has {count} bytes, its manifest says {size}")
        if digest.hexdigest() != sha256:
            raise _WrongBytes(f"it has sha256 {digest.hexdigest()[:12]}, its manifest says {sha256[:12]}")
        with _writing():
            os.truncate(part, count)

    def _make_room(self, part: int, size: int) -> None:
        """Remove what was not used for longest, and give the part its final size, which counts from now on."""
        with _writing(), open(self.directory / ".lock", "wb") as lock:
            self._lock_directory(lock.fileno())
            os.truncate(part, 0)
            files = sorted(self._files())
            total = sum(used for _, used, _ in files)
            for _, used, path in files:
                if total + size <= self._max_bytes:
                    break
                if _remove_unused(path):
                    total -= used
            if total + size > self._max_bytes:
                raise CacheFull(
                    f"data.cache.max_bytes: {self._max_bytes} bytes are too few for {total} that are in use and {size} "
                    f"more, so a shard cannot be fetched; set {total + size} or more"
                )
            os.truncate(part, size)

    def _lock_directory(self, descriptor: int) -> None:
        """Others hold it for moments only, unless one of them was stopped."""
        end = time.monotonic() + PATIENCE_S
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise DataError(
                    f"{self._key}: another process has held {self.directory / '.lock'} for {PATIENCE_S:g} s, so no "
                    f"room can be made; end that process"
                )
            time.sleep(POLL_S)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of each file."""
        for path in self.directory.iterdir():
            if not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path


class _Unwritable(OSError):
    """The disk of the cache does not take more."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Tell errors of our disk from those of the server."""
    try:
        yield
    except OSError as error:
        raise _Unwritable(error.errno, error.strerror) from error


def _write(part: int, chunk: bytes, offset: int) -> None:
    with _writing():
        done = 0
        while done < len(chunk):
            done += os.pwrite(part, chunk[done:], offset + done)


def _may_pass(error: Exception) -> bool:
    return may_pass(error) and not isinstance(error, _Unwritable)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(path: Path) -> bool:
    """Remove a file that nobody reads or fetches; also a part whose process died."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        if _try_lock(descriptor):
            path.unlink(missing_ok=True)
            return True
        return False
    finally:
        os.close(descriptor)
