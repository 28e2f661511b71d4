"""Writing one part of a corpus, and knowing later that it is finished.

A finished part has a marker in the journal: what it was made from and the entries of its shards.  The marker is
written last, so a process that was killed leaves nothing that could be taken for finished.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ValidationError

from megaroute.common.errors import DataError
from megaroute.common.files import atomic_write, sha256_file
from megaroute.data.build import split_documents
from megaroute.data.documents import read_pieces
from megaroute.data.formats import Document, Fields
from megaroute.data.manifest import ShardEntry
from megaroute.data.plan import Part
from megaroute.data.shard_writer import ShardFolderWriter, Tokenize, token_type
from megaroute.data.tokenizer import Tokenizer

FORMAT = 1  # of what is written; a change redoes unfinished jobs


@dataclass(frozen=True)
class Job:
    """What is made of every part alike."""

    drafts: tuple[Path, ...]
    """Folders that take the shards: training, and validation if there is one."""
    journal: Path
    """Folder of the markers."""
    shard_bytes: int
    fields: Fields = field(default_factory=Fields)
    tokenizer: Path | None = None
    tokenize: Tokenize = "no"
    valid_fraction: float = 0.0
    max_bytes: int | None = None


class Marker(BaseModel):
    """A finished part."""

    signature: str
    """`signature` of the job and the part."""
    entries: tuple[tuple[ShardEntry, ...], ...]
    """Shards in each of the job's folders."""


def signature(job: Job, part: Part) -> str:
    """Hexadecimal sha256 of all that decides the bytes of a part; input files count by size and time of change."""
    model = sha256_file(job.tokenizer) if job.tokenizer else None
    options = [FORMAT, version("webdataset"), len(job.drafts), job.shard_bytes, job.valid_fraction, job.max_bytes]
    names = [job.fields.text, job.fields.id, job.fields.metadata, model, job.tokenize]
    pieces = []
    for piece in part:
        status = piece.file.path.stat()
        pieces.append([piece.file.name, piece.start, piece.end, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps([options, names, pieces]).encode()).hexdigest()


def write_part(job: Job, number: int, part: Part, progress: Callable[[int], object]) -> Marker:
    """Write the shards of a part and then its marker; `progress` is told the UTF-8 bytes of each text.

    Raises DataError for input that cannot be read or files that cannot be written.
    """
    clear_part(job, number)
    made_from = signature(job, part)
    tokenizer = Tokenizer(job.tokenizer, "--tokenizer") if job.tokenizer else None
    stored = token_type(tokenizer, job.tokenize)
    try:
        with ExitStack() as stack:
            text = job.tokenize != "only"
            writers = [
                ShardFolderWriter(draft, job.shard_bytes, part=number, tokens=stored, text=text) for draft in job.drafts
            ]
            for writer in writers:
                stack.callback(writer.discard)
            documents = _counted(read_pieces(part, job.fields, job.max_bytes), progress)
            split_documents(documents, writers, tokenizer, job.valid_fraction)
            marker = Marker(signature=made_from, entries=tuple(tuple(w.close()) for w in writers))
        _write_marker(job, number, marker)
    except OSError as error:
        raise DataError(
            f"{error.filename or job.drafts[0]} cannot be written ({error.strerror}), so not all shards were made; "
            f"make room or choose another --out"
        ) from error
    return marker


def finished_part(job: Job, number: int, part: Part) -> Marker | None:
    """The marker of a part that an earlier try finished, if its shards are there with their checksums."""
    try:
        marker = Marker.model_validate_json(_marker_path(job, number).read_bytes())
        if marker.signature != signature(job, part) or len(marker.entries) != len(job.drafts):
            return None
        for path, checksum in _files(job, marker):
            if sha256_file(path) != checksum:
                return None
    except (OSError, ValidationError):
        return None
    return marker


def clear_part(job: Job, number: int) -> None:
    """Remove what an earlier try left of a part, the marker first."""
    _marker_path(job, number).unlink(missing_ok=True)
    for draft in job.drafts:
        for path in draft.glob(f"shard-{number:05d}-*"):
            path.unlink()


def _write_marker(job: Job, number: int, marker: Marker) -> None:
    for path, _ in _files(job, marker):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # before the marker says that it is there
    atomic_write(_marker_path(job, number), marker.model_dump_json())


def _files(job: Job, marker: Marker) -> Iterator[tuple[Path, str]]:
    for draft, entries in zip(job.drafts, marker.entries, strict=True):
        for entry in entries:
            yield draft / entry.name, entry.sha256
            yield draft / entry.index, entry.index_sha256


def _marker_path(job: Job, number: int) -> Path:
    return job.journal / f"part-{number:05d}.json"


def _counted(documents: Iterable[Document], progress: Callable[[int], object]) -> Iterator[Document]:
    for document in documents:
        progress(len(document.text.encode()))
        yield document
