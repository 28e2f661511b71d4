"""A corpus as folders of shards, written by any number of processes, and continued where a killed try stopped.

The shards grow in a draft beside their final folder, the markers of finished parts in a journal beside both.  When all
parts are there the draft gets its manifest and is renamed, and the journal goes.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from megaroute.common.errors import DataError
from megaroute.data.build import check_targets, publish, seal
from megaroute.data.formats import Fields, Piece, TextFile
from megaroute.data.manifest import Manifest
from megaroute.data.parts import Job, Marker, clear_part, finished_part
from megaroute.data.plan import Part, plan_parts
from megaroute.data.pool import write_parts
from megaroute.data.progress import PartsProgress
from megaroute.data.ranks import Ranks, lowest_error
from megaroute.data.shard_writer import Tokenize
from megaroute.data.tokenizer import Tokenizer

STOP_NAME = "stopped"


@dataclass(frozen=True)
class Request:
    """What shards are asked for."""

    out: Path
    """Folder of the shards."""
    valid_out: Path | None = None
    """Folder for the share `valid_fraction` of documents, drawn by a hash of their ids."""
    valid_fraction: float = 0.05
    shard_bytes: int = 64 * 2**20
    """Bytes of texts and ids of a shard, and bytes on disk of a part of the input."""
    fields: Fields = field(default_factory=Fields)
    tokenizer: Path | None = None
    tokenize: Tokenize = "no"
    max_bytes: int | None = None
    """About so much text, taken from all files by one process."""
    overwrite: bool = False

    @property
    def folders(self) -> list[Path]:
        """The folders that are written."""
        return [folder.absolute() for folder in (self.out, self.valid_out) if folder is not None]

    @property
    def job(self) -> Job:
        """What is done with every part."""
        drafts = tuple(_beside(folder, "draft") for folder in self.folders)
        return Job(
            drafts=drafts,
            journal=_beside(self.folders[0], "journal"),
            shard_bytes=self.shard_bytes,
            fields=self.fields,
            tokenizer=self.tokenizer,
            tokenize=self.tokenize,
            valid_fraction=self.valid_fraction,
            max_bytes=self.max_bytes,
        )


def prepare_shards(
    request: Request,
    files: Callable[[], Sequence[TextFile]],
    ranks: Ranks,
    workers: int = 1,
    note: Callable[[str], object] = lambda text: None,
) -> list[Manifest]:
    """Write the shards of `files()` with all `ranks`, each with `workers` processes; the manifests on every rank.

    The files written depend on the input files and the request alone.  Raises DataError for bad input; then, and when
    the processes are killed, finished parts stay for the next call, and `note` is told so; a first try that finished
    none leaves nothing.
    """
    job = request.job
    with _only_one(request, ranks):
        parts = ranks.share(lambda: _plan(request, files()))
        try:
            markers = ranks.share(lambda: _finished(job, parts))
            markers |= _write(job, parts, set(markers), ranks, workers)
            return ranks.share(lambda: _publish(request, [markers[number] for number in range(len(parts))]))
        except BaseException:
            if ranks.rank == 0 and (kept := len(list(job.journal.glob("part-*.json")))):
                note(f"{kept} of {len(parts)} parts are finished and kept; the same command goes on from there")
            raise


def _plan(request: Request, files: Sequence[TextFile]) -> list[Part]:
    if request.tokenizer is not None:
        Tokenizer(request.tokenizer, "--tokenizer")  # refuse a bad one before there is work to lose
    if request.max_bytes is not None:
        return [tuple(map(Piece, files))]
    return plan_parts(files, request.shard_bytes)


def _finished(job: Job, parts: Sequence[Part]) -> dict[int, Marker]:
    """Parts that an earlier try finished.  What is there of any other part is removed."""
    found = {number: finished_part(job, number, part) for number, part in enumerate(parts)}
    known = {path.name.split("-")[1].partition(".")[0] for path in _leftovers(job)}
    for number in map(int, known):
        if found.get(number) is None:
            clear_part(job, number)
    return {number: marker for number, marker in found.items() if marker is not None}


def _leftovers(job: Job) -> Iterator[Path]:
    yield from job.journal.glob("part-*.json")
    for draft in job.drafts:
        yield from draft.glob("shard-*-*")


def _write(job: Job, parts: Sequence[Part], done: set[int], ranks: Ranks, workers: int) -> dict[int, Marker]:
    """This rank's share of the parts; the markers of all ranks.  Raises one of the errors, if there are any."""
    todo = [(number, part) for number, part in enumerate(parts) if number not in done]
    mine = todo[ranks.rank :: ranks.size]
    stop = job.journal / STOP_NAME
    markers: dict[int, Marker] = {}
    failure = None
    try:
        with PartsProgress(len(mine), shown=ranks.rank == 0) as progress:
            write_parts(job, mine, workers, progress, stop.exists, markers.__setitem__)
    except Exception as error:
        stop.touch()  # the others stop after the part at hand
        failure = (len(markers) * ranks.size + ranks.rank, error)
    gathered = ranks.collect((markers, failure))
    first = lowest_error([failure for _, failure in gathered])
    if first is not None:
        raise first
    return {number: marker for part, _ in gathered for number, marker in part.items()}


def _publish(request: Request, markers: Sequence[Marker]) -> list[Manifest]:
    job = request.job
    tokenizer = Tokenizer(request.tokenizer, "--tokenizer") if request.tokenizer else None
    manifests = []
    for place, (draft, folder) in enumerate(zip(job.drafts, request.folders, strict=True)):
        entries = [entry for marker in markers for entry in marker.entries[place]]
        manifests.append(seal(draft, entries, folder, tokenizer, request.tokenize))
    # The training folder last: while it is missing, the job is not done.
    for draft, folder in reversed(list(zip(job.drafts, request.folders, strict=True))):
        publish(draft, folder)
    shutil.rmtree(job.journal)
    return manifests


@contextmanager
def _only_one(request: Request, ranks: Ranks) -> Iterator[None]:
    """Make drafts and journal, and hold a lock, so that two jobs never write the same folder.

    Where nothing is finished at the end, drafts, journal and new parent folders are removed.
    """
    job = request.job
    made = [*job.drafts, job.journal]
    locks: list[int] = []
    parents: list[Path] = []

    def begin() -> None:
        check_targets(request.folders, request.overwrite)
        parents.extend({p for path in made for p in path.parents if not p.exists()})
        try:
            for path in made:
                path.mkdir(parents=True, exist_ok=True)
            locks.append(_lock(job.journal, request.out))
            (job.journal / STOP_NAME).unlink(missing_ok=True)
        except OSError as error:
            if not any(job.journal.glob("part-*.json")):
                _remove(made, parents)
            raise DataError(
                f"{error.filename or request.out} cannot be written ({error.strerror}), so no shards were made; "
                f"choose another --out"
            ) from error

    try:
        ranks.share(begin)
        yield
    finally:
        if ranks.rank == 0:
            if locks and not any(job.journal.glob("part-*.json")):
                _remove(made, parents)
            for lock in locks:
                os.close(lock)


def _lock(journal: Path, out: Path) -> int:
    """Lock the folder of the journal until the process ends or closes the descriptor."""
    descriptor = os.open(journal, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(f"another process is writing {out} at this moment; wait for it, or choose another --out") from (
            error
        )
    except OSError:  # some network file systems have no locks
        pass
    return descriptor


def _remove(folders: Sequence[Path], parents: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for parent in sorted(parents, reverse=True):
        with suppress(OSError):
            parent.rmdir()


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")
