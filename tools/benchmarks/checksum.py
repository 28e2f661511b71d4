"""What a comparison of replicated parameters costs (train.desync_every): the checksum of a tensor, by precision.

Columns: values, precision, milliseconds for one checksum (median), million values per second.  A rank has one checksum
for each of its parameters; what is exchanged besides is four numbers.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import environment, medians, milliseconds
from megaroute.platform import device
from megaroute.training.desync import checksum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--values", type=int, default=20_000_000, metavar="N", help="values of the tensor")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements, of which the median counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per precision."""
    platform = device.resolve(arguments.device)
    if platform.on_cpu:
        torch.set_num_threads(1)  # as milliseconds() wants
    return [_row(arguments, platform, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _row(arguments: argparse.Namespace, platform: device.Platform, dtype: torch.dtype) -> dict[str, Any]:
    tensor = torch.randn(arguments.values, device=platform.device).to(dtype)
    checksum(tensor)

    def run() -> None:
        checksum(tensor)

    turns = [[milliseconds(run, platform)] for _ in range(arguments.repeat)]
    (time,) = medians(turns)
    return {
        "values": arguments.values,
        "precision": str(dtype).removeprefix("torch."),
        "ms": round(time, 3),
        "million_per_s": round(arguments.values / time / 1e3, 1),
        "environment": environment(platform),
    }
