"""One small all-reduce over all ranks, before a run: `srun` runs this with the tasks of the run.

python -m megaroute.training.probe DEVICE
"""

import datetime
import sys
from typing import Any

import torch
import torch.distributed as dist

from megaroute.launch import slurm_env
from megaroute.platform import device

TIMEOUT_S = 120
SIZE = 1024


def main(wanted: Any) -> int:
    """For a value of `run.device`: 1, with a sentence from each rank that sees it, when the sum over all is wrong."""
    slurm_env.set_rank_environment()
    platform = device.resolve(wanted)
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    value = torch.full((SIZE,), float(rank), device=platform.device)
    dist.all_reduce(value)
    wrong = int((value != world_size * (world_size - 1) / 2).sum())
    dist.destroy_process_group()
    if wrong:
        print(f"megaroute: unhealthy: rank {rank}: {wrong} of {SIZE} sums are wrong", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
