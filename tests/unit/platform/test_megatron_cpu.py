from importlib.metadata import version

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

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
}


def test_port_is_pinned_to_the_version_it_was_written_for():
    assert version("megatron-core") == megatron_cpu.MEGATRON_VERSION


def test_port_replaces_the_known_number_of_places_in_each_module():
    assert megatron_cpu.install() == PLACES


def test_port_leaves_torch_as_it_is():
    megatron_cpu.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


def tracker():
    megatron_cpu.install()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("one", 1)
    tracker.add("two", 2)
    return tracker


def test_fork_draws_from_its_own_stream_and_leaves_the_outer_one():
    states = tracker()
    torch.manual_seed(0)
    plain = torch.rand(4)
    torch.manual_seed(0)
    drawn = [torch.rand(1)]
    with states.fork("one"):
        first = torch.rand(2)
    drawn.append(torch.rand(3))
    with states.fork("one"):
        second = torch.rand(2)
    assert torch.equal(torch.cat(drawn), plain)
    assert torch.equal(torch.cat([first, second]), torch.rand(4, generator=torch.Generator().manual_seed(1)))


def test_fork_in_a_fork_keeps_the_progress_of_the_outer_stream():
    states = tracker()
    with states.fork("one"):
        drawn = [torch.rand(2)]
        with states.fork("two"):
            inner = torch.rand(2)
        drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), torch.rand(4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(inner, torch.rand(2, generator=torch.Generator().manual_seed(2)))


def test_tracker_refuses_a_name_or_seed_it_has():
    states = tracker()
    for name, seed in (("one", 9), ("three", 1)):
        with pytest.raises(ValueError, match="already exists"):
            states.add(name, seed)
