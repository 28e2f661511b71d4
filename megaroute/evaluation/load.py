"""A trained model in one process, from a checkpoint of any layout."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megaroute.checkpoint.layout import check_model, read_cursor, read_run, resolve
from megaroute.checkpoint.state import load_state
from megaroute.common.errors import CheckpointError
from megaroute.config.load import load_config
from megaroute.config.parallel import ParallelConfig
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import Cursor
from megaroute.data.tokenizer import Tokenizer
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


def load_run(path: Path) -> Loaded:
    """The model of a run directory (its newest checkpoint) or of one checkpoint folder in it, in eval mode.

    Raises UserError when there is no complete checkpoint, or the tokenizer is not the one it was trained with.
    """
    checkpoint = resolve(path)
    config = _alone(load_config(checkpoint.parent.parent / "config.yaml"))
    check_model(checkpoint, config.model.model_dump(mode="json"), routing_shape(config.model, config.routing))
    tokenizer = Tokenizer(config.data.tokenizer)
    _check_tokenizer(checkpoint, tokenizer)
    platform = device.resolve(config.run.device)
    distributed.start(platform)
    dims = ParallelDims(tensor=1, data=1, pipeline=1)
    groups = bring_up(dims, config.train.seed)
    (model,) = build_chunks(config, dims, pipeline_rank=0, platform=platform)
    load_state(checkpoint, [model], None, groups.data_group, config.checkpoint.verify)
    return Loaded(config, model.eval(), tokenizer, platform, read_run(checkpoint).step)


def _alone(config: Config) -> Config:
    """The same run in one process, where nothing is recomputed because nothing is trained."""
    train = config.train.model_copy(update={"recompute": "none"})
    return config.model_copy(update={"parallel": ParallelConfig(), "train": train})


def _check_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    trained_with = Cursor.from_json(read_cursor(checkpoint)).identity["tokenizer"]
    if tokenizer.fingerprint != trained_with:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer.path} has sha256 {tokenizer.fingerprint[:12]}, but {checkpoint} was trained "
            f"with {trained_with[:12]}, so its ids would mean other text; put that tokenizer back"
        )
