"""What evening out the rows of an MLP over data-parallel ranks costs and saves: `python tools/bench.py exchange`.

Ranks with different numbers of rows run the MLP branch of a layer, forward and backward pass, with and without
exchange, in turns.  A turn ends when the slowest rank is done, as a step of training does.  Ranks are processes of this
machine with one thread each, so a clock needs an idle core, or an accelerator, for each of them.  Processor time of the
rank that takes most of it is told beside: other processes do not change it, but it leaves out waiting for the link.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.ranks import run_ranks
from megaroute.common.errors import LaunchError
from megaroute.config.load import load_config
from megaroute.config.model import ModelConfig
from megaroute.config.root import Config
from megaroute.model.build import build_chunks
from megaroute.model.flops import TRAINING_FACTOR, forward_cost
from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device
from megaroute.platform.device import Platform
from megaroute.routing.exchange import balanced, mean_rows, transfers

CONFIG = Path(__file__).resolve().parents[2] / "pretrain_configs" / "debug" / "cpu.yaml"
WARM_UP = 2
"""Untimed turns: the first calls choose kernels, fill the allocator's caches and open connections."""


@dataclass(frozen=True)
class Setting:
    """What is measured, as it travels to the ranks."""

    ranks: int
    hidden: int
    ffn: int
    activation: str
    precision: Literal["fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda"]
    mean: int
    repeat: int

    def config(self) -> Config:
        """One dense layer of the shape asked for.  Raises ConfigError when it does not fit."""
        overrides = {
            "run.device": self.device,
            "model.num_layers": 1,
            "model.hidden_size": self.hidden,
            "model.num_attention_heads": 1,
            "model.ffn_hidden_size": self.ffn,
            "model.activation": self.activation,
            "model.vocab_size": 64,  # embeddings are built and not used
            "routing.router": "dense",
            "routing.first_dense": 0,
            "train.precision": self.precision,
        }
        return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])

    def counts(self, imbalance: float) -> list[int]:
        """Rows of each rank: `imbalance` times the mean on the first, the rest in equal parts on the others."""
        first = round(imbalance * self.mean)
        others, more = divmod(self.ranks * self.mean - first, self.ranks - 1)
        return [first, *(others + (rank < more) for rank in range(self.ranks - 1))]


def parse_imbalances(text: str) -> list[float]:
    """`1,1.5` -> [1.0, 1.5]."""
    imbalances = [float(part) for part in text.split(",")]
    if not all(imbalance >= 1 for imbalance in imbalances):
        raise argparse.ArgumentTypeError(f"{text!r}: the most rows over the mean are at least 1")
    return imbalances


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="data-parallel ranks (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, metavar="H", help="width of the layer (%(default)s)")
    parser.add_argument("--ffn", type=int, metavar="F", help="inner width of the MLP (4 times the width)")
    parser.add_argument("--activation", default="gelu", help="gelu, or a gated one with a third matrix (%(default)s)")
    parser.add_argument("--rows", type=int, default=1024, metavar="K", help="mean rows of a rank (%(default)s)")
    parser.add_argument(
        "--imbalances", type=parse_imbalances, default="1,1.1,1.25,1.5,2", metavar="X,X,..", help="most rows over mean"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=15, metavar="N", help="turns, of which the median (%(default)s)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per imbalance.  Raises UserError when the options do not fit each other or the machine."""
    setting = Setting(
        ranks=arguments.ranks,
        hidden=arguments.hidden,
        ffn=arguments.ffn or 4 * arguments.hidden,
        activation=arguments.activation,
        precision=arguments.precision,
        device=arguments.device,
        mean=arguments.rows,
        repeat=arguments.repeat,
    )
    _check(setting, arguments.imbalances)
    return measure(setting, arguments.imbalances)


def _check(setting: Setting, imbalances: list[float]) -> None:
    if setting.ranks < 2:
        raise LaunchError(f"--ranks {setting.ranks}: an exchange needs at least 2 ranks")
    if min(setting.mean, setting.repeat) < 1:
        raise LaunchError(f"--rows {setting.mean} and --repeat {setting.repeat} must be at least 1")
    if max(imbalances) > setting.ranks:
        raise LaunchError(
            f"--imbalances has {max(imbalances):g}, but the fullest of {setting.ranks} ranks has at most "
            f"{setting.ranks} times the mean; lower it or raise --ranks"
        )
    setting.config()
    if not device.resolve(setting.device).on_cpu and setting.ranks > torch.accelerator.device_count():
        raise LaunchError(
            f"--ranks {setting.ranks}, but there are {torch.accelerator.device_count()} devices, and ranks that share "
            "one would measure nothing; lower it or use --device cpu"
        )


def measure(setting: Setting, imbalances: list[float]) -> list[dict[str, Any]]:
    """Start the ranks, take turns, and describe what rank 0 measured."""
    return run_ranks(_measure, setting, imbalances, ranks=setting.ranks, device=setting.device)


def _measure(platform: Platform, setting: Setting, imbalances: list[float]) -> list[dict[str, Any]]:
    bench = Bench(setting, platform)
    return [_row(setting, setting.counts(imbalance), bench.turns(imbalance)) for imbalance in imbalances]


class Bench:
    """The MLP branch on one rank.  Communication must be up."""

    def __init__(self, setting: Setting, platform: Platform) -> None:
        config, dims = setting.config(), ParallelDims(1, setting.ranks, 1)
        self.setting, self.platform = setting, platform
        place = groups.bring_up(dims, seed=config.train.seed)
        self.rank, self.group = place.data_rank, place.data_group
        (model,) = build_chunks(config, dims, 0, platform)
        self.layer: nn.Module = model.train().decoder.layers[0]
        self.dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
        self.layer.to(self.dtype)

    def turns(self, imbalance: float) -> dict[str, float]:
        """Median milliseconds without and with exchange, on the clock and of processor time."""
        rows = self.setting.counts(imbalance)[self.rank]
        x_KH, upstream_KH = (
            torch.randn(rows, self.setting.hidden, device=self.platform.device, dtype=self.dtype) for _ in range(2)
        )
        turns = [
            (*self.seconds(self.compute, x_KH, upstream_KH), *self.seconds(self.exchanged, x_KH, upstream_KH))
            for _ in range(WARM_UP + self.setting.repeat)
        ]
        medians = (1e3 * statistics.median(seconds) for seconds in zip(*turns[WARM_UP:], strict=True))
        names = ("ms_without", "cpu_ms_without", "ms_with", "cpu_ms_with")
        return dict(zip(names, medians, strict=True))

    def compute(self, x_KH: Tensor) -> Tensor:
        """The MLP branch."""
        h_KH = self.layer.get_submodule("pre_mlp_layernorm")(x_KH)
        return self.layer.get_submodule("mlp")(h_KH[:, None])[0][:, 0]

    def exchanged(self, x_KH: Tensor) -> Tensor:
        """The same with its rows evened out."""
        return balanced(x_KH, self.compute, self.group)[0]

    def seconds(self, function: Callable[[Tensor], Tensor], x_KH: Tensor, upstream_KH: Tensor) -> tuple[float, float]:
        """Forward and backward pass: until all ranks are done, and processor time of the rank that took most."""
        self.layer.zero_grad(set_to_none=True)
        x_KH = x_KH.detach().requires_grad_()
        self._meet()
        began, began_cpu = time.perf_counter(), time.process_time()
        function(x_KH).backward(upstream_KH)
        cpu = torch.tensor(time.process_time() - began_cpu, device=self.platform.device)
        self._meet()
        seconds = time.perf_counter() - began
        dist.all_reduce(cpu, dist.ReduceOp.MAX, group=self.group)
        return seconds, float(cpu)

    def _meet(self) -> None:
        self.platform.synchronize()
        dist.barrier(self.group)
        self.platform.synchronize()


def _row(setting: Setting, counts: list[int], times: dict[str, float]) -> dict[str, Any]:
    model: ModelConfig = setting.config().model
    row_flops = TRAINING_FACTOR * forward_cost(model).mlp_row
    bytes_per_number = 2 if setting.precision == "bf16" else 4
    flops_per_second = max(counts) * row_flops / (1e-3 * times["ms_without"])
    largest = max((transfer.rows for transfer in transfers(counts)), default=0)
    return {
        "benchmark": "exchange",
        "ranks": setting.ranks,
        "hidden": setting.hidden,
        "ffn": setting.ffn,
        "precision": setting.precision,
        "rows": counts,
        "imbalance": round(max(counts) / setting.mean, 4),
        **times,
        "ratio": times["ms_with"] / times["ms_without"],
        "cpu_ratio": times["cpu_ms_with"] / times["cpu_ms_without"],
        "floor": mean_rows(counts) / max(counts),
        "flops_saved": (max(counts) - mean_rows(counts)) * row_flops,
        # By each rank to the others, there and back, rows and gradients, padding included; not the counts.
        "bytes_sent": 4 * (setting.ranks - 1) * largest * setting.hidden * bytes_per_number,
        "gflops_per_second": flops_per_second / 1e9,
        # A slower link than this, of what it reaches and not what it promises, makes the exchange a loss.
        "break_even_gb_per_second": flops_per_second * 4 * setting.hidden * bytes_per_number / row_flops / 1e9,
    }
