import numpy as np
import pytest
import torch

from megaroute.common.errors import ConfigError
from megaroute.platform import device, distributed

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def test_cpu_communicates_by_gloo():
    platform = device.resolve("cpu")
    assert (platform.device.type, platform.backend, platform.on_cpu, platform.name) == ("cpu", "gloo", True, "cpu")
    platform.synchronize()


@without_cuda
def test_auto_falls_back_to_the_cpu():
    assert device.resolve("auto") == device.resolve("cpu")


@without_cuda
def test_absent_cuda_is_refused_with_key_and_remedy():
    with pytest.raises(ConfigError, match="^run.device is cuda, but torch sees no CUDA device; use run.device=cpu"):
        device.resolve("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_the_device_of_the_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))  # one too many goes round
    platform = device.resolve("auto")
    assert (platform.device, platform.backend) == (torch.device("cuda", 0), "nccl")


def test_process_outside_a_launcher_is_rank_0_of_1(one_process):
    assert distributed.start(device.resolve("cpu")) == (0, 1)
    total = torch.ones(2)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [1.0, 1.0]


def test_on_the_cpu_an_upload_is_the_array_itself():
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    tensor = device.resolve("cpu").upload(array)
    assert tensor.dtype == torch.int64 and np.shares_memory(tensor.numpy(), array)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_upload_arrives_on_the_device():
    array = np.arange(1000, dtype=np.int32)
    tensor = device.resolve("auto").upload(array)
    assert tensor.device.type == "cuda" and tensor.tolist() == array.tolist()
