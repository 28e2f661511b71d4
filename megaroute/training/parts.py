"""What a run is made of."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megaroute.checkpoint.manager import CheckpointManager
from megaroute.config.root import Config
from megaroute.data.stream import Stream
from megaroute.model.routed_layer import RoutedLayer
from megaroute.optim.schedule import BatchSize, Schedule
from megaroute.parallel.groups import Groups
from megaroute.platform.device import Platform
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
    routed: dict[int, RoutedLayer]
    """Routed layers of this stage by global layer index."""
    optimizer: MegatronOptimizer
    schedule: Schedule
    batch_size: BatchSize
    stream: Stream | None
    """Training rows of this replica; None on stages between the first and the last."""
    token_bytes: np.ndarray
    """int32 [vocabulary], bytes of text that each id stands for."""
    checkpoints: CheckpointManager
    state: TrainState
    run_dir: Path
    resumed_from: int | None
    """Step of the checkpoint that the run continues, or None for a fresh start."""

    @property
    def reads_tokens(self) -> bool:
        """Whether this rank's stage needs inputs or targets."""
        return self.groups.is_first_stage or self.groups.is_last_stage
