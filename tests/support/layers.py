"""One layer of the product in one process, and what a forward and backward pass through it gives."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megaroute.config.root import Config
from megaroute.model.build import build_chunks
from megaroute.model.microbatch import micro_batch
from megaroute.parallel.dims import ParallelDims
from megaroute.platform import device
from megaroute.routing.context import RoutingContext

SEQ, BATCH, HIDDEN = 48, 3, 64


@dataclass
class Pass:
    """A forward and backward pass under a fixed upstream gradient."""

    y: Tensor
    gradients: dict[str, Tensor]
    """Of the weights by name, and of the input as "input"."""
    routing: RoutingContext


def config_of(
    model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, num_layers: int = 1, **routing: Any
) -> Config:
    """A configuration for a micro-batch of BATCH rows of SEQ tokens."""
    shape = {"num_attention_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 96, "vocab_size": 64, **(model or {})}
    return Config.model_validate(
        {
            "run": {"name": "layer", "device": "cpu"},
            "model": {"num_layers": num_layers, "hidden_size": HIDDEN, **shape},
            "routing": routing,
            "data": {"train": "none", "tokenizer": "none", "sequence_length": SEQ},
            "train": {"steps": 1, "global_batch": BATCH, "micro_batch": BATCH, **(train or {})},
        }
    )


def model_of(config: Config) -> torch.nn.Module:
    """The whole model, with weights that depend on the seed alone."""
    (model,) = build_chunks(config, ParallelDims(1, 1, 1), 0, device.resolve("cpu"))
    return model


def layer_of(config: Config) -> torch.nn.Module:
    """The only layer of a model of one."""
    return model_of(config).decoder.layers[0]


def context_of(**fields: Any) -> RoutingContext:
    """What routing knows of the micro-batch."""
    return RoutingContext(**{"seed": 5, "step": 7, "samples_B": torch.arange(BATCH), "budget_scale": 1.0, **fields})


def input_of(seed: int = 3) -> Tensor:
    """[SEQ, BATCH, HIDDEN]."""
    return torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed))


def upstream_of(y: Tensor) -> Tensor:
    """The gradient that reaches the output."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(11), dtype=torch.double).to(y.dtype)


def run(layer: torch.nn.Module, x: Tensor, only_SB: Tensor | None = None, **context: Any) -> Pass:
    """Forward and backward; `only_SB`, bool, are the tokens that get an upstream gradient."""
    angles = RotaryEmbedding(kv_channels=layer.config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
    routing = context_of(**context)
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, _ = layer(x, None, rotary_pos_emb=angles(SEQ), packed_seq_params=micro_batch(SEQ, routing))
    upstream = upstream_of(y) if only_SB is None else upstream_of(y) * only_SB[..., None]
    (y * upstream).sum().backward()
    assert x.grad is not None
    missing = [name for name, weight in layer.named_parameters() if weight.grad is None]
    assert not missing, f"without a gradient: {missing}"
    gradients = {name: weight.grad.clone() for name, weight in layer.named_parameters()}
    return Pass(y.detach(), {"input": x.grad, **gradients}, routing)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Tensors of the same names agree to `tolerance` of the largest value of each."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        error = float((ours[name].double() - expected.double()).abs().max())
        assert error <= tolerance * max(scale, 1e-6), f"{name}: {error:.2g} of {scale:.2g}"
