"""The marker of a checkpoint: size and checksum of every file, and the check against them.  No torch.

Checksums are sha256: processors have instructions for it (1.7 GB/s on one core of an EPYC), `sha256sum` reads it, and
no damage passes it.  They find what a disk, a copy or a hand changed; they are no signature, since whoever can change a
file can change the marker too.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megaroute.common.errors import CheckpointError
from megaroute.common.files import sha256_file, write_json

FORMAT = 3
MARKER = "complete.json"

Verify = Literal["full", "sizes", "off"]


class FileRecord(NamedTuple):
    """What the marker says of a file."""

    bytes: int
    sha256: str


def describe(path: Path) -> FileRecord:
    """The record of a file as it lies there."""
    return FileRecord(path.stat().st_size, sha256_file(path))


class HashedFile:
    """A file being written whose checksum is taken from what is written, so that it need not be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes, or anything that shows its bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def record(self) -> FileRecord:
        """The record of what was written so far."""
        return FileRecord(self._bytes, self._hash.hexdigest())


def write_marker(path: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Declare the folder `path` a checkpoint."""
    listed = {name: record._asdict() for name, record in sorted(files.items())}
    write_json(path / MARKER, {"format": FORMAT, "step": step, "files": listed})


def read_marker(path: Path) -> dict[str, FileRecord]:
    """Files of a complete checkpoint; raises CheckpointError when the marker is damaged or of another format."""
    value = read_json(path / MARKER)
    check_format(path / MARKER, value)
    files: Any = value.get("files")
    try:
        return {name: FileRecord(int(record["bytes"]), str(record["sha256"])) for name, record in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged(path / MARKER, "it has no sizes and checksums of files") from None


def verify(path: Path, how: Verify = "full", share: int = 0, shares: int = 1) -> None:
    """Raise CheckpointError, naming the file, unless the files of a complete checkpoint are those that were written.

    Args:
        how: `full` reads every byte; `sizes` finds files that were cut short or lost, as in a copy that broke off;
            `off` finds nothing.
        share: of `shares` processes that check the files together, which one this is.
    """
    if how == "off":
        return
    files = read_marker(path)
    for name in _deal(files, shares)[share]:
        file, record = path / name, files[name]
        if not file.is_file():
            raise damaged(file, "it is missing")
        size = file.stat().st_size
        if size != record.bytes:
            raise damaged(file, f"it has {size} bytes and was written with {record.bytes}")
        if how == "full" and _checksum(file) != record.sha256:
            raise damaged(file, f"its {size} bytes are not those that were written: their sha256 differs")


def _checksum(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise damaged(file, error.strerror or str(error)) from error


def _deal(files: Mapping[str, FileRecord], shares: int) -> list[list[str]]:
    """Names of files for each of `shares` processes, with about as many bytes for each."""
    dealt: list[list[str]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = loads.index(min(loads))
        dealt[least].append(name)
        loads[least] += files[name].bytes
    return dealt


def total_bytes(files: Iterable[FileRecord]) -> int:
    """Bytes of all files together."""
    return sum(file.bytes for file in files)


def check_format(file: Path, value: Mapping[str, Any]) -> None:
    """Raise CheckpointError when `value`, read from `file`, is of another version's format."""
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} has format {value.get('format')}, this version of megaroute reads {FORMAT}; "
            "use the version that wrote the checkpoint (version.json of its run directory)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; raises CheckpointError when it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def damaged(file: Path, reason: str) -> CheckpointError:
    """The error for a file of a checkpoint that is not as it was written."""
    return CheckpointError(
        f"{file} cannot be read ({reason}), so the checkpoint is damaged; set checkpoint.fallback=true, or remove its "
        "folder, to go on from an older one"
    )
