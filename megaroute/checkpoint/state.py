"""Save and load of weights and optimizer state through Megatron-core's dist_checkpointing, free of layout."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from megaroute.checkpoint.layout import MARKER, check_files, is_complete
from megaroute.common.errors import CheckpointError


def save_state(path: Path, chunks: list[GPTModel], optimizer: MegatronOptimizer, replicas: ProcessGroup) -> None:
    """Write this rank's share of weights and optimizer state into the existing folder `path`.  All ranks call it.

    `replicas` is the data-parallel group.
    """
    dist_checkpointing.save(_state_dict(chunks, optimizer, replicas, loading=False), str(path))


def load_state(path: Path, chunks: list[GPTModel], optimizer: MegatronOptimizer | None, replicas: ProcessGroup) -> None:
    """Load weights, and optimizer state when an optimizer is given, from a complete checkpoint.  All ranks call it.

    Raises CheckpointError when the folder is not a complete checkpoint, is damaged or lacks a tensor of the model.
    """
    if not is_complete(path):
        raise CheckpointError(f"{path} has no {MARKER}, so its writing did not finish; choose another checkpoint")
    check_files(path)
    wanted = _state_dict(chunks, optimizer, replicas, loading=True)
    try:
        loaded = dist_checkpointing.load(wanted, str(path), strict="raise_unexpected")
    # Unpickling what a disk gave back can raise anything; torch's exception is not even an Exception.
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


def _state_dict(
    chunks: list[GPTModel], optimizer: MegatronOptimizer | None, replicas: ProcessGroup, loading: bool
) -> dict[str, Any]:
    metadata = {
        # Optimizer state in the shape of the parameters, so that any TP, PP and DP can load it.
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "dp_cp_group": replicas,
    }
    state: dict[str, Any] = {
        f"model{index}": _without_extra_state(chunk.sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Megatron-core's linears save an empty object each for Transformer Engine; nothing here needs them."""
    return {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}
