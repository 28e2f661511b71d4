from importlib.metadata import version

import pytest
import torch

from megaroute.platform import megatron_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the port does nothing where CUDA is available")

PLACES = {
    "pipeline_parallel.schedules": 4,
    "pipeline_parallel.p2p_communication": 4,
    "tensor_parallel.mappings": 4,
    "tensor_parallel.layers": 4,
    "tensor_parallel.utils": 2,
    "tensor_parallel.data": 3,
    "transformer.utils": 2,
    "transformer.attention": 1,
    "distributed.param_and_grad_buffer": 4,
    "optimizer.optimizer": 8,
    "optimizer.distrib_optimizer": 7,
    "optimizer.clip_grads": 4,
    "models.common.language_module.language_module": 1,
    "models.common.embeddings.rotary_pos_embedding": 3,
    "utils": 10,
    "timers": 3,
    "dist_checkpointing.strategies.filesystem_async": 1,
    "dist_checkpointing.strategies.state_dict_saver": 2,
    "dist_checkpointing.strategies.async_utils": 4,
}


def test_port_is_pinned_to_the_version_it_was_written_for():
    assert version("megatron-core") == megatron_cpu.MEGATRON_VERSION


def test_port_replaces_the_known_number_of_places_in_each_module():
    assert megatron_cpu.install() == PLACES


def test_port_leaves_torch_as_it_is():
    megatron_cpu.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()
