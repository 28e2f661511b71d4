"""Bring-up and end of communication between the ranks."""

import datetime
import os

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megaroute.platform import megatron_cpu
from megaroute.platform.device import Platform
from megaroute.platform.memory import keep_freed_memory


def start(platform: Platform, timeout_s: int = 600) -> tuple[int, int]:
    """Join the process group that the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) describes.

    Outside a launcher the process is rank 0 of 1.  Returns (rank, world size).  Ports Megatron-core when on CPU, and
    makes the process keep the memory that tensors free.
    """
    megatron_cpu.install()
    if platform.on_cpu:
        keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", platform.device.type)  # or DeepSpeed warns that it had to guess
    if not dist.is_initialized():
        if "RANK" in os.environ:
            _join(platform, timeout_s)
        else:
            dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def _join(platform: Platform, timeout_s: int) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    if platform.on_cpu:
        # On a CPU DeepSpeed's call would first compile a shared-memory operator: half a minute, a C++ compiler, and a
        # lock file that makes every later run wait for ever when it is killed meanwhile.  Megatron-core's collectives
        # go to torch.distributed and never use that operator.
        dist.init_process_group(platform.backend, timeout=timeout)
        return
    import deepspeed

    deepspeed.init_distributed(dist_backend=platform.backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def stop() -> None:
    """Leave the process group; harmless when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
