"""Models of one process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.models.gpt import GPTModel

from megaroute.config.root import Config
from megaroute.model.build import build_chunks
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.platform import device

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))


@pytest.fixture
def build(one_process: None) -> Callable[[Config], GPTModel]:
    """The whole model of a configuration, initialised."""

    def build(config: Config) -> GPTModel:
        dims = ParallelDims(tensor=1, data=1, pipeline=1)
        bring_up(dims, config.train.seed)
        (model,) = build_chunks(config, dims, pipeline_rank=0, platform=device.resolve("cpu"))
        return model

    return build
