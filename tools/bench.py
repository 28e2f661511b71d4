"""What skipping costs and saves, measured on this machine: `python tools/bench.py layer`.

One routed layer at several densities beside Megatron-core's own dense layer of the same shape: forward and backward
pass, in one process and one thread, in turns.  The floor is the share of the dense layer's FLOPs that a density leaves.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not sys.warnoptions:  # Megatron-core tells its own developers, while imported, what it does without
    warnings.simplefilter("ignore")

import megatron.core
import torch
from torch import Tensor, nn

import megaroute
from megaroute.common.errors import UserError
from megaroute.config.load import load_config
from megaroute.config.model import ModelConfig
from megaroute.config.root import Config
from megaroute.model.build import build_chunks
from megaroute.model.flops import forward_cost
from megaroute.model.microbatch import micro_batch
from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device, distributed
from megaroute.routing.context import RoutingContext, UnitRecord

CONFIG = Path(__file__).resolve().parents[1] / "pretrain_configs" / "debug" / "cpu.yaml"
UNIT = 1
"""The routed layer of the two-layer model that is built; layer 0 is dense."""
WARM_UP = 2
"""Untimed turns: the first calls choose kernels and fill the allocator's caches."""


@dataclass(frozen=True)
class Row:
    """The routed layer at one density; shares and ratios are to the dense layer."""

    density: float
    executed: int
    """Tokens executed."""
    ms: float
    """Forward and backward pass."""
    ratio: float
    floor: float
    """Share of FLOPs: K and V of every token, the rest of the executed ones, causal pairs only."""
    computed: float
    """Share of FLOPs really computed: with the router, and the masked-out pairs of attention's blocks."""
    ratio_to_floor: float


@dataclass(frozen=True)
class Report:
    """A finished measurement."""

    shape: dict[str, int]
    repeat: int
    dense_ms: float
    rows: list[Row]


def parse_densities(text: str) -> list[float]:
    """`1,0.5` -> [1.0, 0.5]."""
    densities = [float(part) for part in text.split(",")]
    if not all(0 < density <= 1 for density in densities):
        raise argparse.ArgumentTypeError(f"{text!r}: densities lie above 0 and at most at 1")
    return densities


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    layer = parser.add_subparsers(dest="benchmark", required=True).add_parser(
        "layer", help="forward and backward pass of one layer, on the CPU, by density", description=__doc__
    )
    layer.add_argument("--hidden", type=int, default=512, metavar="H", help="width of the layer (%(default)s)")
    layer.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (%(default)s)")
    layer.add_argument("--kv-heads", type=int, metavar="N", help="key-value heads (as many as query heads)")
    layer.add_argument("--ffn", type=int, metavar="N", help="inner width of the gated MLP (3 times the width)")
    layer.add_argument("--sequence", type=int, default=1024, metavar="S", help="tokens of a sample (%(default)s)")
    layer.add_argument("--batch", type=int, default=1, metavar="B", help="samples (%(default)s)")
    layer.add_argument("--densities", type=parse_densities, default="1,0.75,0.5,0.25,0.125", metavar="P,P,..")
    layer.add_argument("--repeat", type=int, default=15, metavar="N", help="turns, of which the median (%(default)s)")
    layer.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    if min(arguments.sequence, arguments.batch, arguments.repeat) < 1:
        parser.error("--sequence, --batch and --repeat must be at least 1")
    return arguments


def layer_config(arguments: argparse.Namespace) -> Config:
    """Two layers of the shape asked for, the second one routed.  Raises ConfigError when the shape does not fit."""
    overrides = {
        "run.device": "cpu",
        "model.num_layers": 2,
        "model.hidden_size": arguments.hidden,
        "model.num_attention_heads": arguments.heads,
        "model.num_kv_heads": arguments.kv_heads or arguments.heads,
        "model.ffn_hidden_size": arguments.ffn or 3 * arguments.hidden,
        "model.vocab_size": 64,  # embeddings are built and not used
        "routing.first_dense": UNIT,
        "data.sequence_length": arguments.sequence,
        "train.precision": "fp32",
    }
    return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])


class Bench:
    """Both layers, and what they compute on.  Communication must be up."""

    def __init__(self, config: Config, batch: int) -> None:
        groups.bring_up(ParallelDims(1, 1, 1), seed=config.train.seed)
        (model,) = build_chunks(config, ParallelDims(1, 1, 1), 0, device.resolve("cpu"))
        self.dense, self.routed = model.train().decoder.layers
        self.angles = model.rotary_pos_emb(config.data.sequence_length)
        self.samples_B = torch.arange(batch)
        generator = torch.Generator().manual_seed(config.train.seed)
        shape = (config.data.sequence_length, batch, config.model.hidden_size)
        self.x_SBH = torch.randn(shape, generator=generator)
        self.upstream_SBH = torch.randn(shape, generator=generator)

    def run(self, layer: nn.Module) -> tuple[float, RoutingContext]:
        """Seconds of one forward and backward pass as in training, and what routing recorded.

        Seconds of processor time: with one thread the same as on a clock, but without the turns of other processes.
        """
        context = RoutingContext(samples_B=self.samples_B, budget_scale=1.0)
        packed = micro_batch(self.x_SBH.shape[0], context)
        layer.zero_grad(set_to_none=True)
        x_SBH = self.x_SBH.detach().requires_grad_()
        began = time.process_time()
        y_SBH, _ = layer(x_SBH, None, rotary_pos_emb=self.angles, packed_seq_params=packed)
        y_SBH.backward(self.upstream_SBH)
        return time.process_time() - began, context

    def run_routed(self, bias: float) -> tuple[float, UnitRecord]:
        """The routed layer with a router bias: noise, decisions and the router's gradient are those of training."""
        self.routed.router.state.bias.fill_(bias)
        seconds, context = self.run(self.routed)
        return seconds, context.records[UNIT]

    def bias_for(self, density: float) -> float:
        """The router bias at which this share of tokens, rounded and at least one, is executed."""
        _, record = self.run_routed(0.0)
        assert record.margin_SB is not None
        margins = record.margin_SB.flatten().sort(descending=True).values.tolist()
        executed = max(round(density * len(margins)), 1)
        next_margin = margins[executed] if executed < len(margins) else margins[-1] - 1.0
        return -(margins[executed - 1] + next_margin) / 2


def layer_flops(model: ModelConfig, keep_SB: Tensor) -> int:
    """FLOPs of a forward pass that executes the kept tokens, each with the pairs up to its own position, no router."""
    cost, (seq, _) = forward_cost(model), keep_SB.shape
    pairs = int((torch.arange(1, seq + 1)[:, None] * keep_SB).sum())
    executed = int(keep_SB.sum())
    return keep_SB.numel() * cost.key_value_row + executed * cost.executed_row + pairs * cost.attention_pair


def make_row(model: ModelConfig, density: float, record: UnitRecord, ms: float, dense_ms: float) -> Row:
    """One line of the table.  The factor between forward and backward FLOPs is the same above and below."""
    cost, tokens = forward_cost(model), record.keep_SB.numel()
    dense = layer_flops(model, torch.ones_like(record.keep_SB))
    computed = tokens * (cost.key_value_row + cost.router_row)
    computed += record.rows * cost.executed_row + record.attention_pairs * cost.attention_pair
    ratio, floor = ms / dense_ms, layer_flops(model, record.keep_SB) / dense
    return Row(density, int(record.keep_SB.sum()), ms, ratio, floor, computed / dense, ratio / floor)


def measure(config: Config, batch: int, densities: list[float], repeat: int) -> Report:
    """Take turns through the dense layer and every density; medians.  Communication must be up."""
    bench = Bench(config, batch)
    biases = [bench.bias_for(density) for density in densities]
    records = [bench.run_routed(bias)[1] for bias in biases]
    turns = [
        [bench.run(bench.dense)[0], *(bench.run_routed(bias)[0] for bias in biases)] for _ in range(WARM_UP + repeat)
    ]
    dense_ms, *routed_ms = (1e3 * statistics.median(seconds) for seconds in zip(*turns[WARM_UP:], strict=True))
    model = config.model
    shape = {
        "hidden": model.hidden_size,
        "heads": model.num_attention_heads,
        "kv_heads": model.kv_heads,
        "ffn": model.ffn_hidden_size,
        "sequence": config.data.sequence_length,
        "batch": batch,
    }
    rows = [
        make_row(model, density, record, ms, dense_ms)
        for density, record, ms in zip(densities, records, routed_ms, strict=True)
    ]
    return Report(shape, repeat, dense_ms, rows)


def environment() -> dict[str, Any]:
    """Where and when: what a figure needs beside it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "threads": torch.get_num_threads(),
        "versions": {
            "megaroute": megaroute.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
        },
    }


def cpu_name() -> str:
    """The processor as the kernel names it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def as_json(report: Report) -> str:
    """One object with the measurement and where it was taken."""
    return json.dumps({"benchmark": "layer", **environment(), **dataclasses.asdict(report)}, indent=2)


def as_table(report: Report) -> str:
    """The measurement for people."""
    where = environment()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    hardware = f"{where['hardware']['cpu']}, {where['threads']} thread, load {where['hardware']['load']}"
    lines = [
        "one layer, forward and backward, float32: " + ", ".join(f"{key} {n}" for key, n in report.shape.items()),
        f"{hardware}; {versions}; {where['date']}",
        f"medians of {report.repeat} turns; floor and computed are shares of the dense layer's FLOPs",
        "",
        f"{'density':>8}{'executed':>10}{'ms':>9}{'ratio':>8}{'floor':>8}{'computed':>10}{'ratio/floor':>13}",
        f"{'dense':>8}{report.shape['sequence'] * report.shape['batch']:>10}{report.dense_ms:>9.1f}{1:>8.3f}",
    ]
    lines += [
        f"{row.density:>8g}{row.executed:>10}{row.ms:>9.1f}{row.ratio:>8.3f}{row.floor:>8.3f}{row.computed:>10.3f}"
        f"{row.ratio_to_floor:>13.3f}"
        for row in report.rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status says whether it measured, never how fast."""
    arguments = parse_arguments(argv)
    try:
        config = layer_config(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    torch.set_num_threads(1)
    distributed.start(device.resolve("cpu"))
    report = measure(config, arguments.batch, arguments.densities, arguments.repeat)
    groups.tear_down()
    distributed.stop()
    print(as_json(report) if arguments.json else as_table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
