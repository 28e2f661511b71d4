"""Everything that can be refused before a process group exists and before anything is written.  No torch."""

import os
from pathlib import Path

from megaroute.checkpoint.integrity import verify
from megaroute.checkpoint.layout import (
    WEIGHTS_ONLY,
    check_model,
    complete_checkpoints,
    find_latest,
    read_cursor,
    read_run,
    resolve,
)
from megaroute.checkpoint.lease import check_free
from megaroute.common.errors import CheckpointError, LaunchError
from megaroute.common.files import sha256_file
from megaroute.config.checks import Backend, check_config
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.config.training import CheckpointConfig
from megaroute.data.cursor import Cursor
from megaroute.data.identity import data_identity
from megaroute.data.verify import check_data
from megaroute.launch.devices import detect_device


def check(config: Config, world_size: int) -> None:
    """Raise UserError, in one sentence, for configuration, data, checkpoint or run directory that cannot work."""
    backend: Backend = "gloo" if detect_device(config.run.device) == "cpu" else "nccl"
    check_config(config, world_size, backend)
    check_data(config.data, config.model.vocab_size)
    _check_writable(config.run_directory)
    _check_checkpoint(config)


def _check_writable(directory: Path) -> None:
    """The nearest folder that exists must take new files."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to" if existing.is_dir() else "is a file"
        raise LaunchError(
            f"run.directory: {directory} cannot be made because {existing} {what}; set run.directory to a folder that "
            "you own"
        )


def _check_checkpoint(config: Config) -> None:
    root = config.run_directory / "checkpoints"
    if not root.is_dir():
        _check_initial(config)
        return
    check_free(root)
    if not config.checkpoint.resume:
        if complete_checkpoints(root):
            raise CheckpointError(
                f"checkpoint.resume is false, but {root} holds checkpoints of an earlier run, which would be mixed "
                "with this one's; choose another run.directory or run.name, or remove that folder"
            )
        _check_initial(config)
        return
    latest = _newest(root, config.checkpoint)
    if latest is None:
        _check_initial(config)
        return
    if read_run(latest).layout == WEIGHTS_ONLY:
        raise CheckpointError(
            f"run.directory: {latest} has the weights of an imported model and no optimizer state, so a run cannot go "
            f"on from it; start one from it with checkpoint.init_from={config.run_directory} and another run.directory"
        )
    check_model(latest, config.model.model_dump(mode="json"), routing_shape(config.model, config.routing))
    Cursor.from_json(read_cursor(latest)).continued(data_identity(config.data), config.data.allow_change)


def _check_initial(config: Config) -> None:
    """What a new run starts with must be this model, and ids must mean the same text."""
    settings = config.checkpoint
    if settings.init_from is None:
        return
    path = resolve(settings.init_from)
    verify(path, "off" if settings.verify == "off" else "sizes")
    routing = routing_shape(config.model, config.routing)
    check_model(path, config.model.model_dump(mode="json"), routing, "another checkpoint.init_from")
    saved, now = Cursor.from_json(read_cursor(path)).identity["tokenizer"], sha256_file(config.data.tokenizer)
    if saved != now and "tokenizer" not in config.data.allow_change:
        raise CheckpointError(
            f"data.tokenizer: {config.data.tokenizer} has sha256 {now[:12]}, but the weights of checkpoint.init_from "
            f"{path} read ids of {saved[:12]}, so all text would be other text to them; use that tokenizer, or say "
            "data.allow_change=[tokenizer] to learn it anew"
        )


def _newest(root: Path, settings: CheckpointConfig) -> Path | None:
    """The checkpoint to go on from, by sizes: the ranks together look at every byte."""
    find_latest(root)  # says what is passed over
    candidates = complete_checkpoints(root)[::-1]
    for path in candidates:
        try:
            verify(path, "off" if settings.verify == "off" else "sizes")
            return path
        except CheckpointError:
            if path == candidates[-1] or not settings.fallback:
                raise
    return None
