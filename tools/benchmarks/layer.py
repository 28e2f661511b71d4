"""One layer, forward and backward pass: routed at several densities, beside the same layer without a router.

In one process and one thread, in turns, medians; the ratio is that of neighbouring turns.  The layer without a router
is the faster of Megatron-core's own and the routed class without its routers.  The floor is the share of its FLOPs that
a density leaves: keys and values of every token, the rest of the executed ones.  The MLP is by default a plain one with
GELU, four times as wide as the layer.  In capacity mode a density is that of the rows that are computed, rounded up to
a multiple of 16.
"""

import argparse
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.common import environment, medians, milliseconds, no_collection
from megaroute.common.errors import ConfigError
from megaroute.config.load import load_config
from megaroute.config.model import ModelConfig
from megaroute.config.root import Config
from megaroute.config.routing import PARTS
from megaroute.model.build import build_chunks
from megaroute.model.flops import ForwardCost, causal_pairs, forward_cost
from megaroute.model.microbatch import micro_batch
from megaroute.model.routed_unit import RoutedUnit
from megaroute.parallel import groups
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device, distributed, graphs
from megaroute.platform.device import Platform
from megaroute.routing.context import RoutingContext, UnitRecord
from megaroute.routing.routers.gumbel import GumbelRouter

CONFIG = Path(__file__).resolve().parents[2] / "pretrain_configs" / "debug" / "cpu.yaml"
ROUTED = 1
"""The routed layer of the two-layer models that are built; layer 0 is dense."""
WARM_UP = 2
"""Untimed turns: the first calls choose kernels and fill the allocator's caches."""
UNITS, MODES = tuple(PARTS), ("exact", "capacity")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_densities(text: str) -> list[float]:
    """`1,0.5` -> [1.0, 0.5]."""
    densities = [float(part) for part in text.split(",")]
    if not all(0 < density <= 1 for density in densities):
        raise argparse.ArgumentTypeError(f"{text!r}: densities lie above 0 and at most at 1")
    return densities


def parse_names(known: tuple[str, ...], text: str) -> list[str]:
    """`a,b` -> ["a", "b"], each one of `known`."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--hidden", type=int, default=512, metavar="H", help="width of the layer (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key-value heads (as many as query heads)")
    parser.add_argument("--ffn", type=int, metavar="F", help="inner width of the MLP (4 times the width)")
    parser.add_argument(
        "--activation", choices=("gelu", "swiglu"), default="gelu", help="of a plain MLP, or gated with a third matrix"
    )
    parser.add_argument("--sequence", type=int, default=1024, metavar="S", help="tokens of a sample (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="samples (%(default)s)")
    parser.add_argument("--densities", type=parse_densities, default="1,0.75,0.5,0.25,0.125", metavar="P,P,..")
    for option, known in (("--units", UNITS), ("--modes", MODES)):
        default = ",".join(known)
        parser.add_argument(option, type=partial(parse_names, known), default=default, metavar="A,B,..", help=default)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="turns, of which the median (%(default)s)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per unit, mode and density; on an accelerator, capacity mode also as a recorded graph.

    Raises ConfigError when the shape does not fit.
    """
    if min(arguments.sequence, arguments.batch, arguments.repeat) < 1:
        raise ConfigError("--sequence, --batch and --repeat must be at least 1")
    layer_config(arguments, "layer", "exact")  # refuses what does not fit before anything is started
    platform = device.resolve(arguments.device)
    torch.set_num_threads(1)
    distributed.start(platform)
    groups.bring_up(ParallelDims(1, 1, 1), seed=1)
    rows = measure(arguments, platform)
    groups.tear_down()
    distributed.stop()
    where = environment(platform)
    return [{**row, "environment": where} for row in rows]


def layer_config(arguments: argparse.Namespace, unit: str, mode: str) -> Config:
    """Two layers of the shape asked for, the second one routed.  Raises ConfigError when the shape does not fit."""
    overrides = {
        "run.device": arguments.device,
        "model.num_layers": 2,
        "model.hidden_size": arguments.hidden,
        "model.num_attention_heads": arguments.heads,
        "model.num_kv_heads": arguments.kv_heads or arguments.heads,
        "model.ffn_hidden_size": arguments.ffn or 4 * arguments.hidden,
        "model.activation": arguments.activation,
        "model.vocab_size": 64,  # embeddings are built and not used
        "routing.first_dense": ROUTED,
        "routing.unit": unit,
        "routing.dispatch.mode": mode,
        "routing.capacity.factor": 1.0,
        "data.sequence_length": arguments.sequence,
        "train.precision": arguments.precision,
    }
    return load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])


class Layer:
    """One layer, and the micro-batch that it computes."""

    def __init__(self, layer: nn.Module, angles: Tensor, arguments: argparse.Namespace, platform: Platform) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (arguments.sequence, arguments.batch, arguments.hidden)
        self.x_SBH, self.upstream_SBH = (
            torch.randn(shape, generator=generator).to(platform.device, DTYPES[arguments.precision]) for _ in range(2)
        )
        self.layer, self.angles = layer.to(DTYPES[arguments.precision]), angles
        self.samples_B = torch.arange(arguments.batch, device=platform.device)
        self.context = RoutingContext()

    @property
    def units(self) -> list[RoutedUnit]:
        """The routed units, in the order in which a token meets them."""
        return [cast(RoutedUnit, unit) for unit in getattr(self.layer, "units", nn.ModuleDict()).values()]

    def run(self) -> None:
        """Forward and backward pass as in training."""
        self.context = RoutingContext(samples_B=self.samples_B, budget_scale=1.0)
        self.layer.zero_grad(set_to_none=True)
        x_SBH = self.x_SBH.detach().requires_grad_()
        packed = micro_batch(x_SBH.shape[0], self.context)
        y_SBH, _ = self.layer(x_SBH, None, rotary_pos_emb=self.angles, packed_seq_params=packed)
        y_SBH.backward(self.upstream_SBH)

    def route(self, density: float) -> list[tuple[float, float]]:
        """Bring every router to a density; its (target, bias), for `set`.  Noise and gradients stay those of training.

        The bias is the one at which this share of tokens, rounded and at least one, is executed, or would be where a
        capacity drops some.
        """
        found: list[tuple[float, float]] = []
        for index, unit in enumerate(self.units):  # what the second one sees depends on the first
            self.set([*found, *[(density, 0.0)] * (len(self.units) - index)])
            self.run()
            margin_SB = self.context.records[unit.unit.key].margin_SB
            assert margin_SB is not None
            found.append((density, _bias(margin_SB, density)))
        return found

    def set(self, routes: list[tuple[float, float]]) -> None:
        """Give every router its (target, bias)."""
        for unit, (target, bias) in zip(self.units, routes, strict=True):
            router = cast(GumbelRouter, unit.router)
            router.target = target
            router.state.bias.fill_(bias)


def _bias(margin_SB: Tensor, density: float) -> float:
    margins = margin_SB.flatten().sort(descending=True).values.tolist()
    executed = max(round(density * len(margins)), 1)
    next_margin = margins[executed] if executed < len(margins) else margins[-1] - 1.0
    return -(margins[executed - 1] + next_margin) / 2


@dataclass(frozen=True)
class Variant:
    """One line of the table before it is timed."""

    unit: str
    mode: str
    density: float
    layer: Layer
    routes: list[tuple[float, float]]
    records: list[UnitRecord]
    graph: bool

    def timed(self, platform: Platform) -> Any:
        """What is timed: a call of this function, after `Layer.set`."""
        self.layer.set(self.routes)
        return graphs.recorded(self.layer.run, platform) if self.graph else self.layer.run


def measure(arguments: argparse.Namespace, platform: Platform) -> list[dict[str, Any]]:
    """Every unit, mode and density beside the faster dense layer.  Communication must be up."""
    name, dense = faster(dense_layers(arguments, platform), arguments.repeat, platform)
    rows = []
    for unit in arguments.units:
        for mode in arguments.modes:
            config = layer_config(arguments, unit, mode)
            found = variants(build(arguments, config, platform)[1], unit, mode, arguments.densities, platform)
            times = take_turns(dense, found, arguments.repeat, platform)
            rows += [
                {**make_row(config.model, arguments, variant, each), "dense": name}
                for variant, each in zip(found, times, strict=True)
            ]
    return rows


def build(arguments: argparse.Namespace, config: Config, platform: Platform) -> list[Layer]:
    """The dense and the routed layer of a configuration."""
    (model,) = build_chunks(config, ParallelDims(1, 1, 1), 0, platform)
    angles = model.rotary_pos_emb(config.data.sequence_length)
    return [Layer(layer, angles, arguments, platform) for layer in model.train().decoder.layers]


def dense_layers(arguments: argparse.Namespace, platform: Platform) -> dict[str, Layer]:
    """Both layers without a router."""
    core, ours = build(arguments, layer_config(arguments, "layer", "exact"), platform)
    ours.layer.units = nn.ModuleDict()
    return {"megatron-core": core, "megaroute": ours}


def variants(layer: Layer, unit: str, mode: str, densities: list[float], platform: Platform) -> list[Variant]:
    """The routed layer at each density, and with fixed shapes on an accelerator also as a graph."""
    found = []
    for density in densities:
        routes = layer.route(density)
        layer.set(routes)
        layer.run()
        records = [layer.context.records[each.unit.key] for each in layer.units]
        recordings = (False, True) if mode == "capacity" and not platform.on_cpu else (False,)
        found += [Variant(unit, mode, density, layer, routes, records, graph) for graph in recordings]
    return found


def faster(dense: dict[str, Layer], repeat: int, platform: Platform) -> tuple[str, Layer]:
    """The dense layer that takes less time, and its name."""
    with no_collection():
        turns = [[milliseconds(each.run, platform) for each in dense.values()] for _ in range(WARM_UP + repeat)]
    _, name = min(zip(medians(turns[WARM_UP:]), dense, strict=True))
    return name, dense[name]


@dataclass(frozen=True)
class Times:
    """Medians over all turns."""

    ms: float
    dense_ms: float
    ratio: float
    """Of one to the other in the same turn, so that what else happens on the machine falls on both."""


def take_turns(dense: Layer, found: list[Variant], repeat: int, platform: Platform) -> list[Times]:
    """Time every variant, each time right before or after the dense layer."""
    runs = [variant.timed(platform) for variant in found]
    pairs: list[list[tuple[float, float]]] = [[] for _ in found]
    with no_collection():
        for turn in range(WARM_UP + repeat):
            for variant, run, times in zip(found, runs, pairs, strict=True):
                variant.layer.set(variant.routes)
                order = (run, dense.run) if turn % 2 else (dense.run, run)
                taken = {each: milliseconds(each, platform) for each in order}
                times.append((taken[run], taken[dense.run]))
    return [_times(times[WARM_UP:]) for times in pairs]


def _times(pairs: list[tuple[float, float]]) -> Times:
    ms, dense_ms = medians(pairs)
    return Times(ms, dense_ms, statistics.median(own / other for own, other in pairs))


def make_row(model: ModelConfig, arguments: argparse.Namespace, variant: Variant, times: Times) -> dict[str, Any]:
    """One line of the table.  The factor between forward and backward FLOPs is the same above and below."""
    tokens = arguments.batch * arguments.sequence
    floor = floor_share(model, variant, arguments.batch, arguments.sequence)
    return {
        "benchmark": "layer",
        "unit": variant.unit,
        "mode": variant.mode,
        "graph": variant.graph,
        "density": variant.density,
        "executed": sum(int(record.keep_SB.sum()) for record in variant.records) // len(variant.records),
        "rows": sum(record.rows for record in variant.records) // len(variant.records),
        "ms": times.ms,
        "dense_ms": times.dense_ms,
        "ratio_to_dense": times.ratio,
        "floor": floor,
        "computed": computed_share(model, variant, arguments.batch, arguments.sequence),
        "over_floor": times.ratio / floor,
        "tokens": tokens,
        "repeat": arguments.repeat,
        "shape": {
            "hidden": model.hidden_size,
            "heads": model.num_attention_heads,
            "kv_heads": model.kv_heads,
            "ffn": model.ffn_hidden_size,
            "activation": model.activation,
            "sequence": arguments.sequence,
            "batch": arguments.batch,
            "precision": arguments.precision,
        },
    }


def _part_cost(cost: ForwardCost, part: str, rows: int, pairs: float) -> float:
    """FLOPs of a routed part for so many rows and query-key pairs; keys and values are never routed."""
    attention = rows * cost.query_output_row + pairs * cost.attention_pair
    return {"layer": attention + rows * cost.mlp_row, "attention": attention, "mlp": rows * cost.mlp_row}[part]


def floor_share(model: ModelConfig, variant: Variant, batch: int, seq: int) -> float:
    """Share of the dense layer's FLOPs when each part costs its density of rows, without router and padding."""
    return _share(model, variant, batch, seq, lambda record: record.rows / (batch * seq) * causal_pairs(batch, seq), 0)


def computed_share(model: ModelConfig, variant: Variant, batch: int, seq: int) -> float:
    """Share of the dense layer's FLOPs that was computed, with the router and masked pairs."""
    router = forward_cost(model).router_row
    return _share(model, variant, batch, seq, lambda record: float(record.attention_pairs), router)


def _share(model: ModelConfig, variant: Variant, batch: int, seq: int, pairs: Any, router_row: int) -> float:
    cost, tokens = forward_cost(model), batch * seq
    dense = tokens * cost.key_value_row + _part_cost(cost, "layer", tokens, causal_pairs(batch, seq))
    spent = float(dense)
    for part, record in zip(PARTS[variant.unit], variant.records, strict=True):
        spent -= _part_cost(cost, part, tokens, causal_pairs(batch, seq))
        spent += _part_cost(cost, part, record.rows, pairs(record)) + tokens * router_row
    return spent / dense
