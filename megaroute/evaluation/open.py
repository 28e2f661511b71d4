"""A trained model on the ranks of the environment, from a checkpoint of any layout."""

from pathlib import Path

from megaroute.checkpoint.layout import check_model, read_cursor, resolve
from megaroute.checkpoint.state import load_state
from megaroute.common.errors import CheckpointError, ConfigError
from megaroute.config.checks import check_config
from megaroute.config.load import load_config
from megaroute.config.parallel import ParallelConfig
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import Cursor
from megaroute.data.tokenizer import Tokenizer
from megaroute.evaluation.scoring import Scorer
from megaroute.model.build import build_chunks
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.platform import device, distributed


def open_model(path: Path, tensor: int = 1, pipeline: int = 1) -> Scorer:
    """The model of a run directory (its newest checkpoint) or checkpoint, cut over the processes of the environment.

    What tensor * pipeline leaves of the processes are replicas.  The layout that wrote the checkpoint plays no role.

    Raises UserError when there is no complete checkpoint, its tokenizer is another one, or the processes do not fit.
    """
    checkpoint = resolve(path)
    given = load_config(checkpoint.parent.parent / "config.yaml")
    check_model(checkpoint, given.model.model_dump(mode="json"), routing_shape(given.model, given.routing))
    _check_causal(given)
    tokenizer = Tokenizer(given.data.tokenizer)
    _check_tokenizer(checkpoint, tokenizer)
    platform = device.resolve(given.run.device)
    _, world_size = distributed.start(platform)
    config = _laid_out(given, tensor, pipeline)
    check_config(config)
    dims = ParallelDims.from_config(config.parallel, world_size)
    groups = bring_up(dims, config.train.seed)
    (model,) = build_chunks(config, dims, groups.pipeline_rank, platform)
    load_state(checkpoint, [model], None, groups.data_group)
    return Scorer(config, groups, model.eval(), tokenizer, checkpoint)


def _laid_out(config: Config, tensor: int, pipeline: int) -> Config:
    """The same run on other ranks.  Nothing is trained, so nothing is recomputed, and replicas exchange no rows."""
    changes = {
        "parallel": ParallelConfig(tensor=tensor, pipeline=pipeline),
        "train": config.train.model_copy(update={"recompute": "none"}),
        "routing": config.routing.model_copy(
            update={"dispatch": config.routing.dispatch.model_copy(update={"exchange": "none"})}
        ),
    }
    return config.model_copy(update=changes)


def _check_causal(config: Config) -> None:
    if config.routing.router == "mod" and not config.routing.causal_evaluation:
        raise ConfigError(
            "routing.causal_evaluation is false, so whether a token is executed would depend on tokens that follow it; "
            "evaluate a run that has it true"
        )


def _check_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    trained_with = Cursor.from_json(read_cursor(checkpoint)).identity["tokenizer"]
    if tokenizer.fingerprint != trained_with:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer.path} has sha256 {tokenizer.fingerprint[:12]}, but {checkpoint} was trained "
            f"with {trained_with[:12]}, so its ids would mean other text; put that tokenizer back"
        )
