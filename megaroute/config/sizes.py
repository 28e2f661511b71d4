"""Number of parameters, by arithmetic: nothing is allocated and torch is not needed."""

from collections.abc import Sequence

from megaroute.config.model import ModelConfig


def router_parameters(model: ModelConfig) -> int:
    """Parameters of one router: logits (skip, execute) from the hidden state, no bias."""
    return 2 * model.hidden_size


def layer_parameters(model: ModelConfig, routed: bool = False) -> int:
    """Parameters of one Transformer layer; no projection has a bias.

    Two RMSNorm weights H, query and output projections H * heads * d each, key and value projections H * kv_heads * d
    each, MLP of three (gated) or two matrices H * F; a router adds its two rows of H.
    """
    hidden, head = model.hidden_size, model.head_size
    attention = 2 * hidden * model.num_attention_heads * head + 2 * hidden * model.kv_heads * head
    mlp = (3 if model.gated else 2) * hidden * model.ffn_hidden_size
    return 2 * hidden + attention + mlp + (router_parameters(model) if routed else 0)


def num_parameters(model: ModelConfig, routed_layers: Sequence[int]) -> int:
    """Parameters of the whole model: layers, final norm, embedding, and the output matrix unless it is tied.

    `routed_layers` are the layers that carry a router, as `Config.routed_layers` gives them.
    """
    layers = model.num_layers * layer_parameters(model) + len(routed_layers) * router_parameters(model)
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    return layers + model.hidden_size + embeddings
