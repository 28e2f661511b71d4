"""Which tensors of a checkpoint become which tensors of a Hugging Face model, and back.

Shapes: n query heads, G key-value heads, m = n / G, D head width, H hidden, F inner width of the MLP.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaroute.config.model import ModelConfig
from megaroute.config.routing import PARTS, RoutingConfig


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint and the exported ones that it is made of."""

    source: str
    names: tuple[str, ...]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda whole: (whole,)
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]

    def shapes(self, whole: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of the exported tensors, from that of the checkpoint's."""
        return [tuple(part.shape) for part in self.split(torch.empty(tuple(whole), device="meta"))]


def pieces(model: ModelConfig, routing: RoutingConfig) -> Iterator[Piece]:
    """All of a model, from the embedding to the output projection."""
    yield Piece("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    routed = set(routing.routed_layers(model.num_layers))
    for layer in range(model.num_layers):
        yield from _layer(model, layer, layer in routed)
        if layer in routed:
            yield from _routers(routing, layer)
    yield Piece("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not model.tie_embeddings:
        yield Piece("output_layer.weight", ("lm_head.weight",))


def _layer(model: ModelConfig, layer: int, routed: bool) -> Iterator[Piece]:
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    yield Piece(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",))
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        names = tuple(f"{attention}.{name}_proj.{kind}" for name in "qkv")
        if routed:
            yield Piece(f"{ours}.self_attention.linear_q.{kind}", names[:1])
            yield _grouped(f"{ours}.self_attention.linear_kv.{kind}", names[1:], (1, 1), model)
        else:
            heads = (model.num_attention_heads // model.kv_heads, 1, 1)
            yield _grouped(f"{ours}.self_attention.linear_qkv.{kind}", names, heads, model)
    for name in "qk" if model.qk_norm else "":
        yield Piece(f"{ours}.self_attention.{name}_layernorm.weight", (f"{attention}.{name}_norm.weight",))
    yield Piece(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",))
    yield Piece(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",))
    if model.gated:
        gated = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        yield Piece(
            f"{ours}.mlp.linear_fc1.weight", gated, lambda whole: whole.chunk(2), lambda parts: torch.cat(list(parts))
        )
    else:
        yield Piece(f"{ours}.mlp.linear_fc1.weight", (f"{mlp}.up_proj.weight",))
    yield Piece(f"{ours}.mlp.linear_fc2.weight", (f"{mlp}.down_proj.weight",))


def _grouped(source: str, names: tuple[str, ...], heads: tuple[int, ...], model: ModelConfig) -> Piece:
    """Rows of one key-value head are together in the checkpoint: its queries, its key, its value."""
    groups, width = model.kv_heads, model.head_size

    def split(whole: Tensor) -> list[Tensor]:
        parts = whole.view(groups, sum(heads), width, -1).split(list(heads), 1)
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.view(groups, count, width, -1) for part, count in zip(parts, heads, strict=True)]
        return torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:])

    return Piece(source, names, split, join)


def _routers(routing: RoutingConfig, layer: int) -> Iterator[Piece]:
    tensors = {"random": (), "random_ltd": (), "highway": ("weight",), "mod": ("weight", "predictor")}.get(
        routing.router, ("weight", "state.bias")
    )
    for part in PARTS[routing.unit]:
        for tensor in tensors:
            source = f"decoder.layers.{layer}.units.{part}.router.{tensor}"
            yield Piece(source, (f"model.layers.{layer}.routers.{part}.{tensor.removeprefix('state.')}",))
