"""When checkpoints are written, which stay, and which one a run starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megaroute.checkpoint.layout import (
    RunRecord,
    directory,
    discard,
    find_latest,
    finish,
    read_cursor,
    read_run,
    retain,
)
from megaroute.checkpoint.state import load_state, save_state


class CheckpointManager:
    """Checkpoints of one run.  Every method is called by all ranks together."""

    def __init__(
        self,
        root: Path,
        keep: int,
        every: int | None,
        chunks: list[GPTModel],
        optimizer: MegatronOptimizer,
        replicas: dist.ProcessGroup,
    ) -> None:
        self.root, self.keep, self.every = root, keep, every
        self._chunks, self._optimizer, self._replicas = chunks, optimizer, replicas
        self.last: int | None = None
        """Step of the newest checkpoint that this process wrote or loaded."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        return self.every is not None and step % self.every == 0

    def save(self, record: RunRecord, gather_cursor: Callable[[], dict[str, Any] | None]) -> Path:
        """Write the checkpoint of `record.step`; returns its folder.

        `gather_cursor` is called on all ranks and returns the data cursor on rank 0.  The folder becomes a checkpoint
        only when every rank's tensors are on disk; older ones are removed only then.
        """
        path = directory(self.root, record.step)
        if dist.get_rank() == 0:
            discard(path)  # what an interrupted writer left
            path.mkdir(parents=True)
        dist.barrier()
        save_state(path, self._chunks, self._optimizer, self._replicas)
        cursor = gather_cursor()
        dist.barrier()  # rank 0 may declare the checkpoint complete only when every rank has written its part
        if dist.get_rank() == 0:
            assert cursor is not None
            finish(path, record, cursor)
            retain(self.root, self.keep)
        dist.barrier()  # no rank starts a later save, or ends, while the marker is not there
        self.last = record.step
        return path

    def restore(self) -> tuple[RunRecord, dict[str, Any]] | None:
        """Load the newest complete checkpoint and return its record and data cursor, or None when there is none.

        Rank 0 chooses, so that all ranks load the same one.
        """
        found = [find_latest(self.root) if dist.get_rank() == 0 and self.root.is_dir() else None]
        dist.broadcast_object_list(found, src=0)
        (path,) = found
        if path is None:
            return None
        load_state(path, self._chunks, self._optimizer, self._replicas)
        record = read_run(path)
        self.last = record.step
        return record, read_cursor(path)
