"""What a checkpoint looks like on disk.  No torch: the launcher reads it too.

checkpoints/
  latest                   name of the newest complete checkpoint, replaced in one operation
  lease.json               which start of the run may write here
  step-00000100/
    complete.json          the marker: written last, removed first; a folder without it is not a checkpoint
    run.json               step, samples, tokens; the model and routing sections; format
    cursor.json            position in the data, free of topology
    metadata.json, common.pt, .metadata, *.distcp     in the format of Megatron-core's dist_checkpointing
  step-00000200.partial-*  being written, or left by a writer that was killed
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaroute.checkpoint.integrity import (
    FORMAT,
    MARKER,
    FileRecord,
    check_format,
    damaged,
    describe,
    read_json,
    write_marker,
)
from megaroute.common.errors import CheckpointError
from megaroute.common.files import atomic_write, write_json
from megaroute.common.log import get_logger
from megaroute.config.model import ModelConfig

RUN = "run.json"
CURSOR = "cursor.json"
LATEST = "latest"
PARTIAL = ".partial-"
WEIGHTS_ONLY = "weights only"
"""RunRecord.layout of an imported model, whose checkpoint has no optimizer state."""

log = get_logger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """Where a run stands; everything besides weights, optimizer state and data cursor that decides the next step."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Rows consumed."""
    tokens: int
    """Tokens consumed."""
    nonfinite: int
    """Consecutive steps skipped just before, for a non-finite loss or gradient."""
    model: dict[str, Any]
    """The `model` section of the configuration."""
    routing: dict[str, Any]
    """What of the `routing` section decides which weights there are, by dotted key (config.sizes.routing_shape)."""
    layout: str
    """Layout that wrote the checkpoint, or WEIGHTS_ONLY; any other can load it."""
    valid_loss: float | None = None
    """Validation loss at this very step, nats per token; None where there was no validation."""
    guards: dict[str, Any] = field(default_factory=dict)
    """What the guards of training remember (training.state.GuardState)."""
    format: int = FORMAT


def directory(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def work_directory(root: Path, step: int, owner: str) -> Path:
    """Folder in which `owner`, one start of a run, writes the checkpoint of a step before it is one.

    Two starts of a run, of which the older does not know yet that it is, never write into the same folder.
    """
    return root / f"{directory(root, step).name}{PARTIAL}{owner}"


def is_complete(path: Path) -> bool:
    """Whether a folder is a checkpoint: its marker is there."""
    return (path / MARKER).is_file()


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    return sorted(path for path in root.glob("step-*") if is_complete(path))


def find_latest(root: Path) -> Path | None:
    """Newest complete checkpoint, or None.  Incomplete folders are passed over, and said."""
    for path in sorted(root.glob("step-*")):
        if not is_complete(path):
            log.warning("passing over %s: it has no %s, so its writing did not finish", path, MARKER)
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def resolve(path: Path) -> Path:
    """The checkpoint that a user names: a checkpoint, a `checkpoints` folder, or a run directory.

    Raises CheckpointError when there is none or it is incomplete.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent
    if is_complete(path):
        return path
    for root in (path, path / "checkpoints"):
        latest = find_latest(root) if root.is_dir() else None
        if latest is not None:
            return latest
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a run directory or a checkpoint folder in it")
    raise CheckpointError(
        f"{path} holds no complete checkpoint (a folder with {MARKER}); name a run directory or a checkpoint in it"
    )


def read_run(path: Path) -> RunRecord:
    """The run record of a complete checkpoint; raises CheckpointError when it cannot be read."""
    value = read_json(path / RUN)
    check_format(path / RUN, value)
    try:
        return RunRecord(**value)
    except TypeError as error:
        raise damaged(path / RUN, str(error).partition("() ")[2]) from error


def read_cursor(path: Path) -> dict[str, Any]:
    """The data cursor of a complete checkpoint, as JSON; raises CheckpointError when it cannot be read."""
    return read_json(path / CURSOR)


def check_model(
    path: Path,
    model: dict[str, Any],
    routing: dict[str, Any],
    otherwise: str = "another run.directory to start afresh",
) -> None:
    """Raise CheckpointError, naming the key, when a checkpoint holds another model than the configuration's.

    Args:
        model: the `model` section.
        routing: as in RunRecord.
        otherwise: what may be used instead of the checkpoint's value.
    """
    record = read_run(path)
    older = {key: default for key, default in _defaults().items() if key in model}
    written = {f"model.{key}": value for key, value in {**older, **record.model}.items()} | record.routing
    wanted = {f"model.{key}": value for key, value in model.items()} | routing
    for key in [*wanted, *written]:
        if written.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{key}: checkpoint {path} was written with {written.get(key)}, this run has {wanted.get(key)}; use "
                f"{key}={written.get(key)}, or {otherwise}"
            )


def _defaults() -> dict[str, Any]:
    """What a checkpoint that is older than a key of `model` was written with."""
    return {key: field.default for key, field in ModelConfig.model_fields.items() if not field.is_required()}


def discard(path: Path) -> None:
    """Remove a checkpoint folder, its marker first, so that no reader takes the rest for a checkpoint."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def leftovers(root: Path) -> list[Path]:
    """Folders that a writer left which was killed, or is still writing: not checkpoints."""
    return sorted(path for path in root.glob("step-*") if path.is_dir() and not is_complete(path))


def finish(
    path: Path,
    record: RunRecord,
    cursor: dict[str, Any],
    files: Mapping[str, FileRecord] | None = None,
    work: Path | None = None,
) -> dict[str, FileRecord]:
    """Make the folder `path` a checkpoint whose tensors are all on disk, then move `latest`; returns its files.

    Args:
        files: what is known already of files in the folder; of the others size and checksum are taken here.
        work: folder in which everything was written; it becomes `path`, in place of what was there.
    """
    work = work or path
    write_json(work / RUN, asdict(record))
    write_json(work / CURSOR, cursor, indent=None)  # thousands of lanes: no line for each number
    found = {file.name: file for file in work.iterdir() if file.is_file()}
    known = files or {}
    complete = {name: known[name] if name in known else describe(file) for name, file in found.items()}
    if work != path:
        discard(path)
        sync_directory(work)
        os.rename(work, path)
        sync_directory(path.parent)
    write_marker(path, record.step, complete)
    sync_directory(path)
    atomic_write(path.parent / LATEST, path.name + "\n")
    return complete


def sync_directory(path: Path) -> None:
    """Have the names in a folder on disk: a marker must not outlive a loss of power that its neighbours do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
