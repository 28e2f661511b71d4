"""Floating-point operations of a step, from the rows and pairs that were computed.

A product of [m, k] and [k, n] counts 2 * m * k * n; backward passes count twice the forward (one product for the
input's gradient, one for the weight's).  Norms, activations, softmax and rotary angles are left out.
"""

from dataclasses import dataclass

from megaroute.config.model import ModelConfig

TRAINING_FACTOR = 3
"""Forward and backward together, in units of the forward pass."""


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of the forward pass per row or pair."""

    key_value_row: int
    """K and V projections of one token."""
    executed_row: int
    """Q, attention output and MLP of one token."""
    attention_pair: int
    """Score and weighted value of one query-key pair, all heads."""
    router_row: int
    """Router logits of one token."""
    head_row: int
    """Output projection of one token."""


def forward_cost(model: ModelConfig) -> ForwardCost:
    """Costs for a model's shape."""
    hidden, width = model.hidden_size, model.head_size
    matrices = 3 if model.gated else 2
    queries = model.num_attention_heads * width
    return ForwardCost(
        key_value_row=2 * hidden * 2 * model.kv_heads * width,
        executed_row=2 * hidden * 2 * queries + 2 * matrices * hidden * model.ffn_hidden_size,
        attention_pair=4 * queries,
        router_row=2 * hidden,
        head_row=2 * hidden * model.vocab_size,
    )


def dense_forward(model: ModelConfig, rows: int, sequence_length: int) -> int:
    """FLOPs of a forward pass over `rows` sequences when every token executes every layer, causal pairs only."""
    cost, tokens = forward_cost(model), rows * sequence_length
    pairs = rows * sequence_length * (sequence_length + 1) // 2
    layer = tokens * (cost.key_value_row + cost.executed_row) + pairs * cost.attention_pair
    return model.num_layers * layer + tokens * cost.head_row


def executed_forward(
    model: ModelConfig, rows: int, sequence_length: int, unit_rows: list[int], unit_pairs: list[int]
) -> int:
    """FLOPs of a forward pass in which routed unit i computed unit_rows[i] rows and unit_pairs[i] query-key pairs.

    Padding is in unit_rows, the router and the K and V projections of every token are counted, dense layers in full.
    """
    cost, tokens = forward_cost(model), rows * sequence_length
    dense_layer = (dense_forward(model, rows, sequence_length) - tokens * cost.head_row) // model.num_layers
    total = (model.num_layers - len(unit_rows)) * dense_layer + tokens * cost.head_row
    for computed, pairs in zip(unit_rows, unit_pairs, strict=True):
        total += tokens * (cost.key_value_row + cost.router_row)
        total += computed * cost.executed_row + pairs * cost.attention_pair
    return total
