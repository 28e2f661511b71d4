"""What a run is made of."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megaroute.checkpoint.manager import CheckpointManager
from megaroute.config.root import Config
from megaroute.config.units import Unit
from megaroute.data.ledger import Ledger
from megaroute.data.stream import Stream
from megaroute.optim.schedule import BatchSize, Schedule
from megaroute.parallel.groups import Groups
from megaroute.platform.device import Platform
from megaroute.routing.experts import ExpertRouter
from megaroute.routing.routers import Router
from megaroute.training.heartbeat import Pulse
from megaroute.training.state import TrainState


@dataclass(frozen=True)
class Parts:
    """Everything that setup builds and step and loop use."""

    config: Config
    platform: Platform
    groups: Groups
    chunks: list[GPTModel]
    """Bare models of this stage."""
    wrapped: list[DistributedDataParallel]
    """The same in their precision and data-parallel wrappers; what the schedules run."""
    routers: dict[Unit, Router | ExpertRouter]
    """Routers of this stage."""
    optimizer: MegatronOptimizer
    schedule: Schedule
    batch_size: BatchSize
    stream: Stream | None
    """Training rows of this replica; None where no tokens are read."""
    ledger: Ledger
    """Account of all rows that the run has consumed, equal on all ranks."""
    token_bytes: np.ndarray
    """int32 [vocabulary], bytes of text that each id stands for."""
    checkpoints: CheckpointManager
    state: TrainState
    run_dir: Path
    resumed_from: int | None
    """Step of the checkpoint that the run continues, or None for a fresh start."""
    pulse: Pulse = field(default_factory=Pulse)
    """What this rank is doing, for its watchdog."""

    @property
    def reads_tokens(self) -> bool:
        """Whether this rank's stage needs inputs or targets, or where documents start or rows end."""
        looks_at_rows = self.config.data.pads or not self.config.data.attend_across_documents
        return self.groups.is_first_stage or self.groups.is_last_stage or looks_at_rows
