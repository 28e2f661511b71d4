"""Number of parameters, by arithmetic: nothing is allocated and torch is not needed."""

from typing import Any

from megaroute.config.model import ModelConfig
from megaroute.config.routing import RoutingConfig


def router_parameters(model: ModelConfig, routing: RoutingConfig) -> int:
    """Parameters of one router.

    Binary routers have logits (skip, execute) from the hidden state, without bias; Mixture-of-Depths has its predictor
    beside them; random ones have none.
    """
    if routing.router in ("dense", "random", "random_ltd"):
        return 0
    if routing.router == "moe":
        return routing.moe.experts * model.hidden_size
    rows = 3 if routing.router == "mod" and routing.mod.predictor else 2
    return rows * model.hidden_size


def attention_parameters(model: ModelConfig) -> int:
    """Query and output projections H * heads * d each, key and value projections H * kv_heads * d each, by choice
    biases and two norms of width d."""
    heads, bias = model.num_attention_heads + model.kv_heads, model.num_attention_heads + 2 * model.kv_heads
    return (2 * model.hidden_size * heads + bias * model.qkv_bias + 2 * model.qk_norm) * model.head_size


def mlp_parameters(model: ModelConfig, width: int | None = None) -> int:
    """Three (gated) or two matrices H * F; `width` F is model.ffn_hidden_size unless it is given."""
    return (3 if model.gated else 2) * model.hidden_size * (width or model.ffn_hidden_size)


def expert_width(model: ModelConfig, routing: RoutingConfig) -> int:
    """Inner width of one expert."""
    return routing.moe.ffn_hidden_size or model.ffn_hidden_size // routing.moe.top_k


def routing_shape(model: ModelConfig, routing: RoutingConfig) -> dict[str, Any]:
    """What of `routing` decides which weights a model has, by dotted key: the same for two runs that can share one."""
    shape: dict[str, Any] = {
        "routing.router": routing.router,
        "routing.unit": routing.unit,
        "routing.layers": list(routing.routed_layers(model.num_layers)),
    }
    if routing.router == "moe":
        shape["routing.moe.experts"] = routing.moe.experts
        shape["routing.moe.ffn_hidden_size"] = expert_width(model, routing)
    if routing.router == "mod":
        shape["routing.mod.predictor"] = routing.mod.predictor
    return shape


def layer_parameters(model: ModelConfig) -> int:
    """Parameters of one Transformer layer without a router: two RMSNorm weights, attention, MLP."""
    return 2 * model.hidden_size + attention_parameters(model) + mlp_parameters(model)


def num_parameters(model: ModelConfig, routing: RoutingConfig) -> int:
    """Parameters of the whole model: layers, routers, final norm, embedding, and the output matrix unless tied."""
    units = routing.units(model.num_layers)
    layers = model.num_layers * layer_parameters(model) + len(units) * router_parameters(model, routing)
    if routing.router == "moe":
        experts = routing.moe.experts * mlp_parameters(model, expert_width(model, routing))
        layers += len(units) * (experts - mlp_parameters(model))
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    return layers + model.hidden_size + embeddings
