"""Cached decoding: a routed model beside the dense ones that it is compared with.

A step reads one token of each sample, in one process and one thread, in turns.  The routed model has as many layers as
dense-deep and executes as many per token as dense-effective has.  All three are the code that is exported, with random
weights; text is random, and each router's bias is such that its unit executes the target share of it.
"""

import argparse
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from megaroute.common.errors import ConfigError

WARM_UP = 2
"""Untimed turns."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `tools/bench.py decode`."""
    parser.add_argument("--hidden", type=int, default=512, metavar="H", help="width (%(default)s)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="heads (%(default)s)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key-value heads (as many as heads)")
    parser.add_argument("--ffn", type=int, metavar="F", help="width of the MLP, with GELU (4 * H)")
    parser.add_argument("--layers", type=int, default=12, metavar="L", help="layers of the routed model (%(default)s)")
    parser.add_argument("--first-dense", type=int, default=0, metavar="N", help="of which dense (%(default)s)")
    parser.add_argument("--density", type=float, default=0.5, metavar="P", help="of the others (%(default)s)")
    parser.add_argument("--vocab", type=int, default=4096, metavar="V", help="rows of the embedding (%(default)s)")
    parser.add_argument(
        "--context", type=int, default=256, metavar="S", help="tokens before the first step (%(default)s)"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B", help="samples (%(default)s)")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="steps of a turn (%(default)s)")
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="turns, of which the median (%(default)s)")


def main(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model and batch size.  Raises ConfigError for a shape that does not fit."""
    effective = arguments.first_dense + arguments.density * (arguments.layers - arguments.first_dense)
    if effective != round(effective) or not 0 < effective < arguments.layers:
        raise ConfigError(
            f"--first-dense {arguments.first_dense} + --density {arguments.density:g} * other layers = {effective:g} "
            f"layers per token, and a dense model to compare with needs a whole number between 0 and {arguments.layers}"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    routed = range(arguments.first_dense, arguments.layers)
    models = {
        "dense-effective": _model(arguments, round(effective), ()),
        "dense-deep": _model(arguments, arguments.layers, ()),
        "skip": _model(arguments, arguments.layers, routed),
    }
    _settle(models["skip"], _text(arguments, 8, arguments.context), arguments.density)
    return [row for batch in arguments.batches for row in _rows(models, arguments, batch)]


def _model(arguments: argparse.Namespace, layers: int, routed: Any) -> Any:
    from megaroute.export.hf.configuration_megaroute import MegarouteConfig
    from megaroute.export.hf.modeling_megaroute import MegarouteForCausalLM

    config = MegarouteConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn or 4 * arguments.hidden,
        num_hidden_layers=layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        hidden_act="gelu",
        mlp_gated=False,
        max_position_embeddings=arguments.context + arguments.steps,
        routed_layers=tuple(routed),
        router_densities=(arguments.density,) * len(routed),
    )
    return MegarouteForCausalLM(config).eval()


@torch.no_grad()
def _settle(model: Any, text_BT: Tensor, density: float) -> None:
    """Random routers, each with the bias at which it executes the density, one layer after the other."""

    def settle(router: Any, inputs: tuple[Any, ...]) -> None:
        torch.nn.init.normal_(router.weight)
        router.bias.zero_()
        router.bias.sub_(torch.quantile(router._logit(inputs[0]).flatten(), 1.0 - density))

    hooks = [
        router.register_forward_pre_hook(settle) for layer in model.model.layers for router in layer.routers.values()
    ]
    model(text_BT)
    for hook in hooks:
        hook.remove()


def _text(arguments: argparse.Namespace, batch: int, tokens: int) -> Tensor:
    return torch.randint(arguments.vocab, (batch, tokens))


@torch.no_grad()
def _turn(model: Any, text_BT: Tensor, context: int) -> tuple[float, float, int]:
    """Milliseconds of processor time per step, share of tokens executed by routed units, bytes of the cache."""
    cache = model(text_BT[:, :context], logits_to_keep=1).cache
    executed = []
    began = time.process_time()
    for token_B1 in text_BT[:, context:].split(1, 1):
        executed.append(model(token_B1, cache=cache).executed)
    ms = 1e3 * (time.process_time() - began) / len(executed)
    shares = [float(keep_BT.float().mean()) for step in executed for keep_BT in step]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return ms, statistics.mean(shares) if shares else 1.0, size


def _rows(models: dict[str, Any], arguments: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    turns: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
    for turn in range(WARM_UP + arguments.repeat):
        text_BT = _text(arguments, batch, arguments.context + arguments.steps)
        for name, model in models.items():
            found = _turn(model, text_BT, arguments.context)
            if turn >= WARM_UP:
                turns[name].append(found)
    ms = {name: statistics.median(each[0] for each in found) for name, found in turns.items()}
    return [
        {
            "benchmark": "decode",
            "batch": batch,
            "model": name,
            "layers": models[name].config.num_hidden_layers,
            "density": statistics.mean(each[1] for each in found),
            "ms": ms[name],
            "ratio_to_dense_deep": ms[name] / ms["dense-deep"],
            "ratio_to_dense_effective": ms[name] / ms["dense-effective"],
            "kv_bytes": found[-1][2],
            "load": round(os.getloadavg()[0], 1),
        }
        for name, found in turns.items()
    ]
