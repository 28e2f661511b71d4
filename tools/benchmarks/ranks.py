"""Ranks of a benchmark, as processes of this machine that are joined to each other."""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from megaroute.launch.command import free_port
from megaroute.parallel import groups
from megaroute.platform import device, distributed

Device = Literal["auto", "cpu", "cuda"]


def run_ranks(measure: Callable[..., Any], *arguments: Any, ranks: int, device: Device, threads: int = 1) -> Any:
    """What `measure(platform, *arguments)` returned on rank 0; it runs on every one of the ranks."""
    results = get_context("spawn").SimpleQueue()
    spawn(_rank_main, (measure, arguments, ranks, device, threads, free_port(), results), nprocs=ranks)
    return results.get()


def _rank_main(
    rank: int,
    measure: Callable[..., Any],
    arguments: tuple[Any, ...],
    ranks: int,
    device_name: Device,
    threads: int,
    port: int,
    results: Any,
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(threads)
    platform = device.resolve(device_name)
    distributed.start(platform)
    found = measure(platform, *arguments)
    if rank == 0:
        results.put(found)
    torch.distributed.barrier()
    groups.tear_down()
    distributed.stop()
