"""When checkpoints are written, which stay, and which one a run starts from."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megaroute.checkpoint.background import Background, writing
from megaroute.checkpoint.integrity import total_bytes
from megaroute.checkpoint.layout import (
    RunRecord,
    complete_checkpoints,
    directory,
    discard,
    find_latest,
    finish,
    leftovers,
    read_cursor,
    read_run,
    work_directory,
)
from megaroute.checkpoint.lease import Holder, Lease
from megaroute.checkpoint.pending import Pending, Saved, removed_on_failure
from megaroute.checkpoint.retention import Retention
from megaroute.checkpoint.space import check_space
from megaroute.checkpoint.staging import Staging
from megaroute.checkpoint.state import load_state, state_to_save, together, verify_together
from megaroute.checkpoint.writer import Written, describe_tensors, plan, write
from megaroute.common.errors import CheckpointError
from megaroute.common.log import get_logger
from megaroute.config.training import CheckpointConfig

log = get_logger(__name__)


class CheckpointManager:
    """Checkpoints of one run.  Every method is called by all ranks together.

    `lease` is rank 0's, where there is one: without it nobody else may write below `root`.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        chunks: list[GPTModel],
        optimizer: MegatronOptimizer,
        replicas: dist.ProcessGroup,
        lease: Lease | None = None,
    ) -> None:
        self.root, self._config, self._lease = root, config, lease
        self._retention = Retention(config.keep, config.keep_every, config.keep_best)
        self._chunks, self._optimizer, self._replicas = chunks, optimizer, replicas
        self._staging = Staging()
        self._pending: Pending | None = None
        self._saved: list[Saved] = []
        self.last: int | None = None
        """Step of the newest complete checkpoint that this process wrote or loaded."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        every = self._config.every
        return every is not None and step % every == 0

    def save(self, record: RunRecord, gather_cursor: Callable[[], dict[str, Any] | None], wait: bool = True) -> Path:
        """Write the checkpoint of `record.step`; returns its folder.

        `gather_cursor` is called on all ranks and returns the data cursor on rank 0.  The folder becomes a checkpoint
        only when every rank's tensors are on disk; older ones are removed only then.  Without `wait` the tensors are
        copied and written while the caller goes on: weights and optimizer state may change after `let_update`, and
        `poll` or `drain` completes the checkpoint.

        Raises, on all ranks, CheckpointWriteError when it cannot be written, and LeaseLostError when another start of
        the run writes here now.
        """
        self.drain()
        began, what = time.perf_counter(), f"checkpoint of step {record.step}"
        share = plan(state_to_save(self._chunks, self._optimizer, self._replicas))
        cursor = gather_cursor()
        needed = sum(together(lambda: share.bytes))
        work = together(lambda: self._begin(record.step, needed))[0]
        assert work is not None
        with removed_on_failure(work):
            copy = None if wait else self._staging.copy(share, self._parameters())
            rank, make = dist.get_rank(), (lambda: share) if copy is None else copy.make
            background = Background(lambda: write(make(), work, rank), what, in_thread=not wait)
        self._pending = Pending(record, cursor, work, not wait, began, background, copy, halted=began)
        if wait:
            self.drain()
        else:
            self._pending.go_on()
        return directory(self.root, record.step)

    def let_update(self) -> None:
        """Wait until weights and optimizer state of this rank may change."""
        pending = self._pending
        if pending is not None and pending.copy is not None:
            pending.halt()
            pending.copy.wait()
            pending.copy = None
            pending.go_on()

    @property
    def can_advance(self) -> bool:
        """Whether this rank has done its part of a checkpoint that is being written."""
        return self._pending is not None and (self._pending.declaring or self._pending.writing).is_done()

    def poll(self, advance: bool = False) -> list[Saved]:
        """Checkpoints that were completed since the last call.

        `advance`, which must be the same on all ranks, says that since the last call `can_advance` was true on every
        one of them, so that none has to wait.  When all have written their parts, rank 0 begins to declare the
        checkpoint complete; when that is done, it is.
        """
        pending = self._pending
        if advance and pending is not None:
            pending.halt()
            self._advance(pending)
            pending.go_on()
        saved, self._saved = self._saved, []
        return saved

    def drain(self) -> None:
        """Wait until nothing is being written."""
        while self._pending is not None:
            self._pending.halt()
            self._pending.beside = False
            self._advance(self._pending)

    def _advance(self, pending: Pending) -> None:
        """Wait for what is going on, and begin the next: after writing declaring, after that nothing."""
        self._pending = None
        with removed_on_failure(pending.work):
            if pending.declaring is None:
                shares = together(pending.writing.result)
                what = f"checkpoint of step {pending.record.step}"
                pending.declaring = Background(lambda: self._declare(pending, shares), what, pending.beside)
                self._pending = pending
                return
            written = together(pending.declaring.result)[0]
        self.last = pending.record.step
        path, ended = directory(self.root, pending.record.step), time.perf_counter()
        assert pending.halted is not None
        stall = pending.stall_seconds + ended - pending.halted
        self._saved.append(Saved(path, ended - pending.began, stall, written))

    def restore(self) -> tuple[RunRecord, dict[str, Any]] | None:
        """Load the newest complete checkpoint and return its record and data cursor, or None when there is none.

        Rank 0 chooses, so that all ranks load the same one.  A damaged one is passed over with checkpoint.fallback.
        """
        self.drain()
        path = self._soundest()
        if path is None:
            return None
        load_state(path, self._chunks, self._optimizer, self._replicas, verify="off")
        record = read_run(path)
        self.last = record.step
        return record, read_cursor(path)

    def _soundest(self) -> Path | None:
        """The newest complete checkpoint that is as it was written."""
        here = dist.get_rank() == 0 and self.root.is_dir()
        if here:
            find_latest(self.root)  # says what it passes over
        candidates = together(lambda: complete_checkpoints(self.root)[::-1] if here else [])[0]
        for index, path in enumerate(candidates):
            try:
                verify_together(path, self._config.verify)
                return path
            except CheckpointError as error:
                if path == candidates[-1] or not self._config.fallback:
                    raise
                log.error("%s; checkpoint.fallback is true: trying %s", error, candidates[index + 1])
        return None

    def _begin(self, step: int, needed: int) -> Path | None:
        """On rank 0 make the folder to write into."""
        if dist.get_rank() != 0:
            return None
        work = work_directory(self.root, step, Holder.this_process().token)
        with writing(f"checkpoint of step {step}"):
            self._check_lease()
            self.root.mkdir(parents=True, exist_ok=True)
            for path in leftovers(self.root):
                discard(path)
            check_space(self.root, step, needed)
            work.mkdir()
        return work

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for chunk in self._chunks for parameter in chunk.parameters())

    def _declare(self, pending: Pending, shares: list[Written]) -> int:
        """On rank 0 make what all ranks wrote a checkpoint; returns its bytes."""
        if dist.get_rank() != 0:
            return 0
        record, path = pending.record, directory(self.root, pending.record.step)
        assert pending.cursor is not None
        files = describe_tensors(pending.work, shares)
        self._check_lease()
        files = finish(path, record, pending.cursor, files, pending.work)
        self._retention.apply(self.root, self._check_lease)
        return total_bytes(files.values())

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()
