"""A trained model on the ranks of the environment, from a checkpoint of any layout."""

from pathlib import Path
from typing import Literal

from megaroute.checkpoint.state import load_state
from megaroute.common.errors import ConfigError
from megaroute.config.checks import check_config
from megaroute.config.parallel import ParallelConfig
from megaroute.config.root import Config
from megaroute.evaluation.scoring import Scorer
from megaroute.export.source import open_source
from megaroute.model.build import build_chunks
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.platform import device, distributed

Precision = Literal["fp32", "bf16"]


def open_model(path: Path, tensor: int = 1, pipeline: int = 1, precision: Precision = "fp32") -> Scorer:
    """The model of a run directory (its newest checkpoint) or checkpoint, cut over the processes of the environment.

    What tensor * pipeline leaves of the processes are replicas.  The layout that wrote the checkpoint plays no role.
    `precision` is that of the arithmetic: rounded to bf16, a result depends on how the model is cut and on the batch.

    Raises UserError when there is no complete checkpoint, its tokenizer is another one, or the processes do not fit.
    """
    source = open_source(path)
    check_causal(source.config)
    platform = device.resolve(source.config.run.device)
    _, world_size = distributed.start(platform)
    config = _laid_out(source.config, tensor, pipeline, precision)
    check_config(config)
    dims = ParallelDims.from_config(config.parallel, world_size)
    groups = bring_up(dims, config.train.seed)
    (model,) = build_chunks(config, dims, groups.pipeline_rank, platform)
    load_state(source.checkpoint, [model], None, groups.data_group, config.checkpoint.verify)
    return Scorer(config, groups, [model.eval()], source.tokenizer, source.record.step, source.checkpoint)


def _laid_out(config: Config, tensor: int, pipeline: int, precision: Precision) -> Config:
    """The same run on other ranks.  Nothing is trained, so nothing is recomputed, and replicas exchange no rows."""
    changes = {
        "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline),
        "train": config.train.model_copy(update={"recompute": "none", "precision": precision}),
        "routing": config.routing.model_copy(
            update={"dispatch": config.routing.dispatch.model_copy(update={"exchange": "none"})}
        ),
    }
    return config.model_copy(update=changes)


def check_causal(config: Config) -> None:
    """Raise ConfigError for a router that would look at tokens to come."""
    if config.routing.router == "mod" and not config.routing.causal_evaluation:
        raise ConfigError(
            "routing.causal_evaluation is false, so whether a token is executed would depend on tokens that follow it; "
            "evaluate a run that has it true"
        )
