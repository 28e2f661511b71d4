"""Bring-up of Megatron-core's process groups.  The one caller of its `parallel_state`."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megaroute.parallel.dims import ParallelDims

_dims: ParallelDims | None = None
"""What the groups that are up were made for."""


@dataclass(frozen=True)
class Groups:
    """This rank's place, and the groups that others need."""

    dims: ParallelDims
    rank: int
    tensor_rank: int
    data_rank: int
    pipeline_rank: int
    data_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.dims.pipeline - 1


def bring_up(dims: ParallelDims, seed: int) -> Groups:
    """Make Megatron-core's groups for `dims` on the running process group, replacing those of other dims."""
    global _dims
    if _dims != dims:
        tear_down()
        parallel_state.initialize_model_parallel(
            dims.tensor,
            dims.pipeline,
            virtual_pipeline_model_parallel_size=dims.virtual_pipeline if dims.virtual_pipeline > 1 else None,
        )
        _dims = dims
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)  # sequence parallelism forks this tracker, though nothing here draws from it
    tensor, data, pipeline = dims.coordinates(dist.get_rank())
    assert tensor == parallel_state.get_tensor_model_parallel_rank()
    assert data == parallel_state.get_data_parallel_rank()
    assert pipeline == parallel_state.get_pipeline_model_parallel_rank()
    return Groups(dims, dist.get_rank(), tensor, data, pipeline, parallel_state.get_data_parallel_group())


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights as this one, those of its own included; groups must be up."""
    return parallel_state.get_data_parallel_group()


def model_group() -> dist.ProcessGroup:
    """The ranks that hold one replica of the model among them, of all stages and tensor ranks; groups must be up."""
    return parallel_state.get_model_parallel_group()


def tear_down() -> None:
    """End the groups; harmless when there are none.

    Megatron-core only forgets them; each gloo group would go on with its thread, which polls, until the process ends.
    """
    global _dims
    _dims = None
    if not parallel_state.model_parallel_is_initialized():
        return
    for group in parallel_state._global_process_group_list:
        if group is not None:  # None stands for the default group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
