"""The sharded state dict of a run, and loading it through Megatron-core's dist_checkpointing, free of layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from megaroute.checkpoint import integrity
from megaroute.checkpoint.integrity import MARKER, Verify, read_marker
from megaroute.checkpoint.layout import is_complete
from megaroute.checkpoint.pieces import SHARDING, optimizer_state
from megaroute.checkpoint.unpickle import read_common, read_metadata
from megaroute.common.errors import CheckpointError, MegarouteError

T = TypeVar("T")


def state_to_save(chunks: list[GPTModel], optimizer: MegatronOptimizer, replicas: ProcessGroup) -> dict[str, Any]:
    """Weights and optimizer state of this rank, as sharded tensors that share the memory of the run's.

    `replicas` is the data-parallel group.  No rank talks to another.
    """
    state = _model_state(chunks, replicas)
    return {**state, "optimizer": optimizer_state(optimizer, state)}


def load_state(
    path: Path,
    chunks: list[GPTModel],
    optimizer: MegatronOptimizer | None,
    replicas: ProcessGroup,
    verify: Verify = "full",
) -> None:
    """Load weights, and optimizer state when an optimizer is given, from a complete checkpoint.  All ranks call it.

    Raises CheckpointError when the folder is not a complete checkpoint, is damaged, would run code, or lacks a tensor
    of the model.
    """
    if not is_complete(path):
        raise CheckpointError(f"{path} has no {MARKER}, so its writing did not finish; choose another checkpoint")
    verify_together(path, verify)
    together(lambda: _check_harmless(path))
    wanted = _model_state(chunks, replicas)
    if optimizer is not None:
        wanted["optimizer"] = optimizer.sharded_state_dict(dict(wanted), is_loading=True, metadata=_metadata(replicas))
    try:
        loaded = dist_checkpointing.load(wanted, str(path), strict="raise_unexpected")
    # What a disk gave back can raise anything; torch's exception is not even an Exception.
    except (Exception, CheckpointException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise CheckpointError(
            f"{path} cannot be loaded into this model ({reason}); the checkpoint is damaged or belongs to another model"
        ) from error
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected and all(key.endswith("_extra_state") for key in missing), (missing, unexpected)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def verify_together(path: Path, how: Verify) -> None:
    """`integrity.verify` with the files dealt to all ranks; every rank raises when one does."""
    together(lambda: integrity.verify(path, how, dist.get_rank(), dist.get_world_size()))


def together(work: Callable[[], T], keep: bool = False) -> list[T]:
    """Run `work` on every rank and return all results, by rank.

    When it raises a MegarouteError on some rank, all ranks raise that of the first, and none waits for another.  With
    `keep` only the verdicts travel: results of other ranks are this rank's own.
    """
    mine: Any = None
    failed: MegarouteError | None = None
    try:
        mine = work()
    except MegarouteError as error:
        failed = error
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (failed, None if keep else mine))
    for verdict, _ in gathered:
        if verdict is not None:
            raise verdict
    return [mine if keep else result for _, result in gathered]


def _check_harmless(path: Path) -> None:
    """Look through what Megatron-core and torch are about to unpickle."""
    read_marker(path)
    read_metadata(path)
    read_common(path)


def _metadata(replicas: ProcessGroup) -> dict[str, Any]:
    return {
        # Optimizer state in the shape of the weights, so that any TP, PP and DP can load it.
        "distrib_optim_sharding_type": SHARDING,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": replicas,
    }


def _model_state(chunks: list[GPTModel], replicas: ProcessGroup) -> dict[str, Any]:
    return {
        f"model{index}": _without_extra_state(chunk.sharded_state_dict(metadata=_metadata(replicas)))
        for index, chunk in enumerate(chunks)
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Megatron-core's linears save an empty object each for Transformer Engine; nothing here needs them."""
    return {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}
