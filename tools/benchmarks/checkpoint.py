"""How long saving and loading a checkpoint take, and for how long training stands still: `tools/bench.py checkpoint`.

A row per number of ranks, which are replicas of one model and share its optimizer state.  `save_seconds` is a save that
is waited for.  `stall_seconds` is what ranks wait for a save beside training: to agree on its beginning and end, and
for the copy, where that takes longer than the forward and backward pass of a step, for which --pass-seconds stands;
they idle in it, so processors that training would use are the writer's.  `stall_share` is the ratio of the two, and
`load_seconds` has the check of every byte in it.  Medians of --repeat after a first save of each kind.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks.common import environment
from benchmarks.ranks import run_ranks
from megaroute.checkpoint.layout import RunRecord
from megaroute.checkpoint.manager import CheckpointManager
from megaroute.checkpoint.pending import Saved
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.model.build import build_chunks
from megaroute.optim.build import build_optimizer, wrap
from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform.device import Platform

CONFIG = Path(__file__).resolve().parents[2] / "pretrain_configs" / "debug" / "cpu.yaml"


@dataclass(frozen=True)
class Setting:
    """What is measured, as it travels to the ranks."""

    ranks: int
    hidden: int
    layers: int
    precision: Literal["fp32", "bf16"]
    device: Literal["auto", "cpu"]
    repeat: int
    pass_seconds: float
    folder: str

    def config(self) -> Config:
        """A model of the shape asked for.  Raises ConfigError when it does not fit."""
        overrides = {
            "run.device": self.device,
            "model.num_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": 1,
            "model.num_kv_heads": 1,
            "model.ffn_hidden_size": 3 * self.hidden,
            "model.vocab_size": 8192,
            "train.precision": self.precision,
            "checkpoint.keep": 1,
        }
        return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tools/bench.py checkpoint`."""
    parser.add_argument("--ranks", default="1,2,4", metavar="N,..", help="numbers of ranks (%(default)s)")
    parser.add_argument("--hidden", type=int, default=768, metavar="H", help="width (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, metavar="L", help="layers (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="(%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu"], default="cpu", help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="saves, of which the median (%(default)s)")
    parser.add_argument(
        "--pass-seconds", type=float, default=0.5, metavar="S", help="forward and backward pass of a step (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="disk to write to (the one of temporary files)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of ranks.  Raises ConfigError for a shape that does not fit."""
    rows = []
    for ranks in map(int, arguments.ranks.split(",")):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            setting = Setting(
                ranks,
                arguments.hidden,
                arguments.layers,
                arguments.precision,
                arguments.device,
                arguments.repeat,
                arguments.pass_seconds,
                folder,
            )
            setting.config()
            threads = max(1, (os.cpu_count() or 1) // ranks)
            rows.append(run_ranks(_row, setting, ranks=ranks, device=setting.device, threads=threads))
    return rows


def _row(platform: Platform, setting: Setting) -> dict[str, Any]:
    config, dims = setting.config(), ParallelDims(1, setting.ranks, 1)
    group = groups.bring_up(dims, seed=1).data_group
    chunks = build_chunks(config, dims, 0, platform)
    optimizer = build_optimizer(config, wrap(config, chunks))
    manager = CheckpointManager(Path(setting.folder), config.checkpoint, chunks, optimizer, group)
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    about = {"benchmark": "checkpoint", "ranks": setting.ranks, "parameters": parameters}
    row = _measure(manager, setting.repeat, setting.pass_seconds, platform)
    return {**about, "precision": setting.precision, **row, **environment(platform)}


def _measure(manager: CheckpointManager, repeat: int, pass_seconds: float, platform: Platform) -> dict[str, Any]:
    record = RunRecord(0, 0, 0, 0, {}, {}, "")
    waited, beside = [], []
    for step in range(repeat + 1):
        waited.append(_save(manager, replace(record, step=2 * step + 1), 0.0, platform))
        beside.append(_save(manager, replace(record, step=2 * step + 2), pass_seconds, platform))
    loads = []
    for _ in range(repeat):
        dist.barrier()
        began = time.perf_counter()
        manager.restore()
        loads.append(time.perf_counter() - began)
    save = statistics.median(saved.seconds for saved in waited[1:])
    stall = statistics.median(saved.stall_seconds for saved in beside[1:])
    return {
        "bytes": waited[-1].bytes,
        "save_seconds": save,
        "stall_seconds": stall,
        "stall_share": stall / save,
        "beside_seconds": statistics.median(saved.seconds for saved in beside[1:]),
        "load_seconds": statistics.median(loads),
    }


def _save(manager: CheckpointManager, record: RunRecord, pass_seconds: float, platform: Platform) -> Saved:
    """Save, and let steps pass until that is complete; without seconds for a step, wait."""
    dist.barrier()
    manager.save(record, dict, wait=not pass_seconds)
    saved = manager.poll()
    while not saved:
        time.sleep(pass_seconds)
        ready = torch.tensor(int(manager.can_advance), device=platform.device)
        dist.all_reduce(ready, dist.ReduceOp.MIN)  # a step has its sum in any case
        manager.let_update()
        saved = manager.poll(bool(ready))
    return saved[0]
