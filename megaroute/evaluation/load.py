"""A trained model in one process, from a checkpoint of any layout."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megaroute.checkpoint.state import load_state
from megaroute.config.parallel import ParallelConfig
from megaroute.config.root import Config
from megaroute.data.tokenizer import Tokenizer
from megaroute.export.source import Source, open_source
from megaroute.model.build import build_chunks
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.platform import device, distributed


@dataclass(frozen=True)
class Loaded:
    """A model ready for inference, and the tokenizer that it was trained with."""

    config: Config
    model: GPTModel
    tokenizer: Tokenizer
    platform: device.Platform
    step: int
    """Optimizer steps that it was trained for."""

    @property
    def sample(self) -> Tensor:
        """int64 [1], the sample number of a context, for routers that draw also at inference."""
        return torch.zeros(1, dtype=torch.int64, device=self.platform.device)

    def document_starts(self, context: list[int]) -> Tensor | None:
        """Where the document of each token starts, int32 [S, 1]; None when tokens see other documents too.

        An end-of-document token in front of a context belongs to another document.
        """
        if self.config.data.attend_across_documents:
            return None
        starts = torch.full((len(context), 1), int(context[0] == self.tokenizer.eod), dtype=torch.int32)
        starts[0] = 0
        return starts.to(self.platform.device)


def load_run(path: Path) -> Loaded:
    """The model of a run directory (its newest checkpoint) or of one checkpoint folder in it, in eval mode.

    Raises UserError when there is no complete checkpoint, or the tokenizer is not the one it was trained with.
    """
    return load_native(open_source(path))


def load_native(source: Source) -> Loaded:
    """The model of an opened checkpoint."""
    config = _alone(source.config)
    platform = device.resolve(config.run.device)
    distributed.start(platform)
    dims = ParallelDims(tensor=1, data=1, pipeline=1)
    groups = bring_up(dims, config.train.seed)
    (model,) = build_chunks(config, dims, pipeline_rank=0, platform=platform)
    load_state(source.checkpoint, [model], None, groups.data_group, config.checkpoint.verify)
    return Loaded(config, model.eval(), source.tokenizer, platform, source.record.step)


def _alone(config: Config) -> Config:
    """The same run in one process, where nothing is recomputed because nothing is trained."""
    train = config.train.model_copy(update={"recompute": "none"})
    return config.model_copy(update={"parallel": ParallelConfig(), "train": train})
