import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up, tear_down

ALONE = ParallelDims(tensor=1, data=1, pipeline=1)


def test_a_process_alone_is_first_and_last_stage(one_process):
    groups = bring_up(ALONE, seed=1)
    assert (groups.rank, groups.tensor_rank, groups.data_rank, groups.pipeline_rank) == (0, 0, 0, 0)
    assert groups.is_first_stage and groups.is_last_stage
    assert dist.get_world_size(groups.data_group) == 1


def test_the_same_dims_reuse_the_groups_and_seed_the_generator_anew(one_process):
    first = bring_up(ALONE, seed=1).data_group
    drawn = torch.rand(3)
    second = bring_up(ALONE, seed=1).data_group
    assert second is parallel_state.get_data_parallel_group() is first
    assert torch.equal(torch.rand(3), drawn)


def test_groups_are_made_anew_after_they_were_torn_down(one_process):
    first = bring_up(ALONE, seed=1).data_group
    tear_down()
    assert bring_up(ALONE, seed=1).data_group is not first


def test_bringing_groups_up_again_leaves_no_thread_of_the_old_ones(one_process):
    bring_up(ALONE, seed=1)
    before = psutil.Process().num_threads()
    for _ in range(3):
        tear_down()
        bring_up(ALONE, seed=1)
    assert psutil.Process().num_threads() <= before + 2


def test_tearing_down_twice_is_harmless(one_process):
    bring_up(ALONE, seed=1)
    tear_down()
    tear_down()
    assert not parallel_state.model_parallel_is_initialized()
