"""How the tensor ranks of a replica come to the same rows: each reads them, or one reads and broadcasts.

A step is a pause of so many milliseconds.  The wait is that of the rank which is last to have its rows; processor time
is of all ranks and their workers together.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from benchmarks.common import environment
from benchmarks.corpus import make_corpus
from benchmarks.ranks import run_ranks
from megaroute.config.data import DataConfig
from megaroute.data.stream import open_stream
from megaroute.platform.device import Platform

WARM_UP = 4
"""Untimed steps, in which workers start and open their shards."""


@dataclass(frozen=True)
class Setting:
    """What is measured, as it travels to the ranks."""

    data: DataConfig
    ranks: int
    rows: int
    step_ms: float
    steps: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="tokenizer.model and train/; made if new")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="tensor ranks (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, metavar="B", help="rows of a step (%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="S", help="tokens of a row (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="workers of a reading rank (%(default)s)")
    parser.add_argument("--step-ms", type=float, default=200, metavar="MS", help="time of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps, of which the median (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="(%(default)s)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way."""
    with _folder(arguments.corpus) as folder:
        make_corpus(folder, 8192, 8_000_000)
        data = DataConfig(
            train=folder / "train",
            tokenizer=folder / "tokenizer.model",
            sequence_length=arguments.sequence_length,
            workers=arguments.workers,
        )
        setting = Setting(data, arguments.ranks, arguments.rows, arguments.step_ms, arguments.steps)
        return run_ranks(_measure, setting, ranks=arguments.ranks, device=arguments.device)


@contextmanager
def _folder(corpus: Path | None) -> Iterator[Path]:
    if corpus is not None:
        yield corpus
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _measure(platform: Platform, setting: Setting) -> list[dict[str, Any]]:
    return [
        {
            "benchmark": "supply",
            "way": way,
            "ranks": setting.ranks,
            "rows": setting.rows,
            "sequence_length": setting.data.sequence_length,
            "workers": setting.data.workers,
            "step_ms": setting.step_ms,
            **steps(platform, setting),
            **environment(platform),
        }
        for way, steps in {"every rank reads": _read, "one reads and broadcasts": _broadcast}.items()
    ]


def _read(platform: Platform, setting: Setting) -> dict[str, Any]:
    with open_stream(setting.data, "train") as stream:
        return _steps(lambda: platform.upload(stream.take(setting.rows).ids), platform, setting)


def _broadcast(platform: Platform, setting: Setting) -> dict[str, Any]:
    if dist.get_rank() == 0:
        with open_stream(setting.data, "train") as stream:
            return _steps(lambda: _sent(platform.upload(stream.take(setting.rows).ids)), platform, setting)
    shape = (setting.rows, setting.data.sequence_length + 1)
    return _steps(lambda: _sent(torch.empty(shape, dtype=torch.int32, device=platform.device)), platform, setting)


def _sent(ids: torch.Tensor) -> torch.Tensor:
    dist.broadcast(ids, 0)
    return ids


def _steps(take: Callable[[], torch.Tensor], platform: Platform, setting: Setting) -> dict[str, Any]:
    waits, checksum, began = [], 0, 0.0
    for step in range(WARM_UP + setting.steps):
        if step == WARM_UP:
            began = _processor_seconds()
        time.sleep(setting.step_ms / 1e3)
        dist.barrier()
        start = time.perf_counter()
        ids = take()
        platform.synchronize()
        waits.append(time.perf_counter() - start)
        checksum += int(ids.long().sum())
    used = (_processor_seconds() - began) / setting.steps
    # All ranks must have seen the same rows; the slowest one is waited for.
    seen = torch.tensor([checksum, -checksum], device=platform.device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    assert seen[0] == -seen[1], "ranks have different rows"
    slowest = torch.tensor(waits[WARM_UP:], device=platform.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    total = torch.tensor(used, device=platform.device)
    dist.all_reduce(total)
    wait_ms = 1e3 * statistics.median(slowest.tolist())
    return {
        "wait_ms": wait_ms,
        "wait_share": wait_ms / (setting.step_ms + wait_ms),
        "processor_ms": 1e3 * float(total),
        "checksum": checksum,
    }


def _processor_seconds() -> float:
    """Processor time of this process and of its workers."""
    process = psutil.Process()
    times = [found.cpu_times() for found in (process, *process.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)
