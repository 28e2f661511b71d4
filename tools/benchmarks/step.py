"""A whole training step: a routed model beside the dense ones that it is compared with.

Reading rows, forward and backward pass, the all-reduce and the update, in one process and one thread, in turns.  The
routed model has as many layers as dense-deep and executes as many per token as dense-effective has; what it costs more
than the latter is what skipping costs: keys and values of skipped tokens, routers, and overhead.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.corpus import make_corpus
from megaroute.common.errors import ConfigError
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.parallel import groups
from megaroute.platform import device, distributed
from megaroute.routing.routers.gumbel import GumbelRouter
from megaroute.training.parts import Parts
from megaroute.training.setup import setup
from megaroute.training.step import StepResult, run_step

CONFIG = Path(__file__).resolve().parents[2] / "pretrain_configs" / "debug" / "cpu.yaml"
WARM_UP = 3
"""Untimed turns: the first steps fill the allocator's caches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tools/bench.py step`."""
    parser.add_argument("--hidden", type=int, default=256, metavar="H", help="width (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="heads (%(default)s)")
    parser.add_argument("--layers", type=int, default=8, metavar="L", help="layers of the routed model (%(default)s)")
    parser.add_argument("--first-dense", type=int, default=2, metavar="N", help="of which dense (%(default)s)")
    parser.add_argument("--effective", type=int, default=4, metavar="N", help="layers per token (%(default)s)")
    parser.add_argument("--sequence", type=int, default=512, metavar="S", help="tokens of a row (%(default)s)")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows of a step (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="B", help="rows of a pass (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu"], default="cpu", help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="turns, of which the median (%(default)s)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model.  Raises ConfigError for a shape that does not fit."""
    routed = arguments.layers - arguments.first_dense
    if not 0 < arguments.effective - arguments.first_dense < routed:
        raise ConfigError(
            f"--effective {arguments.effective} must lie between --first-dense {arguments.first_dense} and --layers "
            f"{arguments.layers}, so that routed layers execute some tokens and skip some"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), vocab_size=2048, max_bytes=2 * 2**20)
        configs = {name: _config(arguments, Path(folder), keys) for name, keys in _models(arguments).items()}
        platform = device.resolve(arguments.device)
        distributed.start(platform)
        runs = {name: setup(config, platform, world_size=1) for name, config in configs.items()}
        for parts in runs.values():
            _settle(parts)
        found = _rows(runs, _timed(runs, arguments.repeat))
        for parts in runs.values():
            assert parts.stream is not None
            parts.stream.close()
        groups.tear_down()
        distributed.stop()
    return found


def _models(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    density = (arguments.effective - arguments.first_dense) / (arguments.layers - arguments.first_dense)
    # Logits of no spread: decisions are those of the noise, at the density that the bias says, from the first step on.
    routed = {
        "routing.first_dense": arguments.first_dense,
        "routing.density": density,
        "routing.init_logit_std": 1e-6,
        "optim.lr": 1e-9,
        "optim.min_lr": 0.0,
    }
    return {
        "dense-effective": {"routing.router": "dense", "model.num_layers": arguments.effective},
        "dense-deep": {"routing.router": "dense"},
        "skip exact": routed,
        "skip capacity": {**routed, "routing.dispatch.mode": "capacity"},
    }


def _config(arguments: argparse.Namespace, corpus: Path, keys: dict[str, Any]) -> Config:
    overrides = {
        "run.directory": corpus / "run",
        "run.device": arguments.device,
        "model.num_layers": arguments.layers,
        "model.hidden_size": arguments.hidden,
        "model.num_attention_heads": arguments.heads,
        "model.ffn_hidden_size": 4 * arguments.hidden,
        "model.activation": "gelu",
        "model.vocab_size": 2048,
        "data.train": corpus / "train",
        "data.valid": corpus / "valid",
        "data.tokenizer": corpus / "tokenizer.model",
        "data.sequence_length": arguments.sequence,
        "train.global_batch": arguments.rows,
        "train.micro_batch": arguments.micro_batch,
        "train.precision": arguments.precision,
        **keys,
    }
    return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])


def _settle(parts: Parts) -> None:
    """Give every router the bias at which the noise alone executes the target density."""
    for router in parts.routers.values():
        assert isinstance(router, GumbelRouter)
        router.state.bias.fill_(math.log(router.target / (1.0 - router.target)))


def _timed(runs: dict[str, Parts], repeat: int) -> dict[str, list[tuple[float, StepResult]]]:
    """Steps of all models in turns; the warm-up is left out."""
    found: dict[str, list[tuple[float, StepResult]]] = {name: [] for name in runs}
    for turn in range(WARM_UP + repeat):
        for name, parts in runs.items():
            began = _clock(parts)
            result = run_step(parts)
            seconds = _clock(parts) - began
            parts.state.advance(result.rows, parts.config.data.sequence_length, result.skipped)
            if turn >= WARM_UP:
                found[name].append((seconds, result))
    return found


def _clock(parts: Parts) -> float:
    """Seconds: of processor time on the CPU, where other processes would otherwise count too."""
    parts.platform.synchronize()
    return time.process_time() if parts.platform.device.type == "cpu" else time.perf_counter()


def _rows(runs: dict[str, Parts], timed: dict[str, list[tuple[float, StepResult]]]) -> list[dict[str, Any]]:
    ms = {name: 1e3 * statistics.median(seconds for seconds, _ in steps) for name, steps in timed.items()}
    flops = {name: statistics.median(result.executed_flops for _, result in steps) for name, steps in timed.items()}
    tokens = {name: steps[0][1].totals.tokens for name, steps in timed.items()}
    return [
        {
            "benchmark": "step",
            "model": name,
            "layers": parts.config.model.num_layers,
            "density": _density(timed[name]),
            "ms": ms[name],
            "tokens_per_second": 1e3 * tokens[name] / ms[name],
            "flops_per_token": flops[name] / tokens[name],
            "ratio_to_effective": ms[name] / ms["dense-effective"],
            "flops_to_effective": flops[name] / flops["dense-effective"],
            "ratio_to_deep": ms[name] / ms["dense-deep"],
            "flops_to_deep": flops[name] / flops["dense-deep"],
            "load": round(os.getloadavg()[0], 1),
        }
        for name, parts in runs.items()
    ]


def _density(steps: list[tuple[float, StepResult]]) -> float | None:
    """Mean share of tokens executed in the routed units, or None without any."""
    shares = [share for _, result in steps for share in result.totals.density]
    return statistics.mean(shares) if shares else None
