"""What a checkpoint looks like on disk.  No torch: the launcher reads it too.

checkpoints/
  latest                   name of the newest complete checkpoint, replaced in one operation
  step-00000100/
    complete.json          the marker: written last, removed first; a folder without it is not a checkpoint
    run.json               step, samples, tokens; the model and routing sections; format
    cursor.json            position in the data, free of topology
    metadata.json, common.pt, .metadata, *.distcp     written by Megatron-core's dist_checkpointing
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaroute.common.errors import CheckpointError
from megaroute.common.files import atomic_write, write_json
from megaroute.common.log import get_logger

FORMAT = 2
MARKER = "complete.json"
RUN = "run.json"
CURSOR = "cursor.json"
LATEST = "latest"

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
    """Layout that wrote the checkpoint; any other can load it."""
    format: int = FORMAT


def directory(root: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return root / f"step-{step:08d}"


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
    value = _read_json(path / RUN)
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / RUN} has format {value.get('format')}, this version of megaroute reads {FORMAT}; "
            "use the version that wrote the checkpoint (version.json of its run directory)"
        )
    try:
        return RunRecord(**value)
    except TypeError as error:
        raise _damaged(path / RUN, str(error).partition("() ")[2]) from error


def read_cursor(path: Path) -> dict[str, Any]:
    """The data cursor of a complete checkpoint, as JSON; raises CheckpointError when it cannot be read."""
    return _read_json(path / CURSOR)


def check_files(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file of a complete checkpoint has its full size.

    Finds files that were cut short or lost, as in a copy that broke off; not bytes that changed.
    """
    sizes = _read_json(path / MARKER).get("bytes")
    if not isinstance(sizes, dict):
        raise _damaged(path / MARKER, "it has no file sizes")
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if file.stat().st_size != size:
            raise _damaged(file, f"it has {file.stat().st_size} bytes and was written with {size}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read ({reason}), so the checkpoint is damaged; remove its folder to use an older one"
    )


def check_model(path: Path, model: dict[str, Any], routing: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the key, when a checkpoint holds another model than the configuration's.

    Args:
        model: the `model` section.
        routing: as in RunRecord.
    """
    record = read_run(path)
    written = {f"model.{key}": value for key, value in record.model.items()} | record.routing
    wanted = {f"model.{key}": value for key, value in model.items()} | routing
    for key in [*wanted, *written]:
        if written.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{key}: checkpoint {path} was written with {written.get(key)}, this run has {wanted.get(key)}; use "
                f"{key}={written.get(key)}, or another run.directory to start afresh"
            )


def discard(path: Path) -> None:
    """Remove a checkpoint folder, its marker first, so that no reader takes the rest for a checkpoint."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def finish(path: Path, record: RunRecord, cursor: dict[str, Any]) -> None:
    """Write the small files of a checkpoint whose tensors are all on disk, the marker last, then move `latest`."""
    write_json(path / RUN, asdict(record))
    write_json(path / CURSOR, cursor, indent=None)  # thousands of lanes: no line for each number
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}
    write_json(path / MARKER, {"format": FORMAT, "step": record.step, "bytes": files})
    atomic_write(path.parent / LATEST, path.name + "\n")


def retain(root: Path, keep: int) -> None:
    """Remove complete checkpoints but the newest `keep`."""
    for path in complete_checkpoints(root)[:-keep]:
        discard(path)
