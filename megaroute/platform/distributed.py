"""Bring-up and end of communication between the ranks."""

import datetime
import os
import time
from pathlib import Path

import torch
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


def any_rank(flag: bool, platform: Platform) -> bool:
    """Whether `flag` is set on any rank; all of them call it."""
    sign = torch.tensor(float(flag), device=platform.device)
    dist.all_reduce(sign, dist.ReduceOp.MAX)
    return bool(sign)


def stop() -> None:
    """Leave the process group; harmless when there is none.  Afterwards the process may end."""
    if dist.is_initialized():
        dist.destroy_process_group()
        let_go()


def let_go(tasks: Path = Path("/proc/self/task"), timeout_s: float = 5.0) -> None:
    """Wait until the threads of gloo groups hold no tensor of the last collective any more.

    Such a thread frees them after it has told the waiting main thread that all is done, and needs Python's global lock
    to do so.  Destroying a group ends its threads only if nobody else refers to it, a DDP hook or a graph for example.
    If the interpreter goes away first, the thread aborts the process, though the work is done.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        time.sleep(0.01)  # without the lock
        if time.monotonic() > deadline or not any(_is_running_gloo(task) for task in tasks.glob("*/stat")):
            return


def _is_running_gloo(stat: Path) -> bool:
    try:
        name, state = stat.read_text().split("(", 1)[1].rsplit(") ", 1)
    except OSError:
        return False  # the thread has ended
    return name == "pt_gloo_runloop" and state.startswith("R")
