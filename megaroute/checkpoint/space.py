"""Room for the next checkpoint, asked for before anything is written or removed.  No torch."""

import shutil
from pathlib import Path

from megaroute.common.errors import CheckpointWriteError

MARGIN = 4 << 20
"""Bytes for what is not tensors: names, offsets, data cursor."""


def check_space(root: Path, step: int, needed: int) -> None:
    """Raise CheckpointWriteError unless the file system of `root` has `needed` bytes of tensors and some more free.

    Quotas are not seen here; a write that meets one fails, and the older checkpoints stay all the same.
    """
    free = shutil.disk_usage(root).free
    if free < needed + MARGIN:
        raise CheckpointWriteError(
            f"{root} has {free / 1e9:,.3f} GB free and the checkpoint of step {step} needs "
            f"{(needed + MARGIN) / 1e9:,.3f} GB, so it was not begun and the older checkpoints are untouched; free "
            "space or lower checkpoint.keep, then start the same command again"
        )
