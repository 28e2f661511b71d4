"""Floating-point operations of a step, from the rows and pairs that were computed.

A product of [m, k] and [k, n] counts 2 * m * k * n; backward passes count twice the forward (one product for the
input's gradient, one for the weight's).  Norms, activations, softmax and rotary angles are left out, and so is what
activation recomputation repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megaroute.config.model import ModelConfig
from megaroute.config.routing import RoutingConfig
from megaroute.config.sizes import expert_width
from megaroute.config.units import Part, Unit

TRAINING_FACTOR = 3
"""Forward and backward together, in units of the forward pass."""

EXECUTED_PARTS = ("key_value", "query_output", "attention", "mlp", "router", "padding", "head")
"""What executed FLOPs are made of.  `padding` is what was computed and thrown away: rows beyond the kept tokens, and
query-key pairs that a mask removed."""


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of the forward pass per row or pair."""

    key_value_row: int
    """K and V projections of one token."""
    query_output_row: int
    """Q projection and attention output of one token."""
    mlp_row: int
    """Dense MLP of one token."""
    expert_row: int
    """One expert of a mixture for one token."""
    attention_pair: int
    """Score and weighted value of one query-key pair, all heads."""
    router_row: int
    """One router for one token, with the predictor of Mixture-of-Depths."""
    head_row: int
    """Output projection of one token."""

    @property
    def executed_row(self) -> int:
        """Q, attention output and MLP of one token."""
        return self.query_output_row + self.mlp_row


@dataclass(frozen=True)
class UnitWork:
    """What one unit did in a step, summed over micro-batches and replicas."""

    unit: Unit
    kept: int
    """Tokens kept."""
    rows: int
    """Rows computed, padding included; of a mixture of experts, pairs of token and expert."""
    pairs: int = 0
    """Query-key pairs computed; 0 for an MLP."""
    needed_pairs: int = 0
    """Those of a kept token and a key that it sees."""
    overflow: int = 0
    """Rows that the router wanted and the capacity did not allow."""


def forward_cost(model: ModelConfig, routing: RoutingConfig | None = None) -> ForwardCost:
    """Costs for a model's shape; without `routing`, those of the method's router."""
    routing = routing or RoutingConfig()
    hidden, width = model.hidden_size, model.head_size
    matrices = 3 if model.gated else 2
    queries = model.num_attention_heads * width
    return ForwardCost(
        key_value_row=2 * hidden * 2 * model.kv_heads * width,
        query_output_row=2 * hidden * 2 * queries,
        mlp_row=2 * matrices * hidden * model.ffn_hidden_size,
        expert_row=2 * matrices * hidden * expert_width(model, routing),
        attention_pair=4 * queries,
        router_row=2 * hidden * _router_outputs(routing),
        head_row=2 * hidden * model.vocab_size,
    )


def _router_outputs(routing: RoutingConfig) -> int:
    """Inner products with a token: a binary router needs one, for the difference of its logits."""
    if routing.router in ("dense", "random", "random_ltd"):
        return 0
    if routing.router == "moe":
        return routing.moe.experts
    return 2 if routing.router == "mod" and routing.mod.predictor else 1


def causal_pairs(rows: int, sequence_length: int) -> int:
    """Query-key pairs of causal attention over `rows` sequences."""
    return rows * sequence_length * (sequence_length + 1) // 2


def dense_forward(model: ModelConfig, rows: int, sequence_length: int, pairs: int | None = None) -> int:
    """FLOPs of a forward pass over `rows` sequences when every token executes every layer.

    `pairs` are the query-key pairs of one layer, the causal ones when not given.
    """
    cost, tokens = forward_cost(model), rows * sequence_length
    layer = tokens * (cost.key_value_row + cost.executed_row)
    layer += (causal_pairs(rows, sequence_length) if pairs is None else pairs) * cost.attention_pair
    return model.num_layers * layer + tokens * cost.head_row


def executed_forward(
    model: ModelConfig,
    routing: RoutingConfig,
    rows: int,
    sequence_length: int,
    work: Sequence[UnitWork],
    dense_pairs: tuple[int, int] | None = None,
) -> dict[str, int]:
    """FLOPs by EXECUTED_PARTS of a forward pass over `rows` sequences in which the units did `work`.

    K and V projections and routers are counted for every token, branches without a router in full.  `dense_pairs` are
    the query-key pairs of one attention without a router, computed and needed; the causal ones when not given.
    """
    computed, needed = dense_pairs or (causal_pairs(rows, sequence_length),) * 2
    cost, tokens = forward_cost(model, routing), rows * sequence_length
    dense = {
        branch: model.num_layers - sum(_has(each.unit.part, branch) for each in work) for branch in ("attention", "mlp")
    }
    parts = dict.fromkeys(EXECUTED_PARTS, 0)
    parts["key_value"] = model.num_layers * tokens * cost.key_value_row
    parts["query_output"] = dense["attention"] * tokens * cost.query_output_row
    parts["attention"] = dense["attention"] * needed * cost.attention_pair
    parts["mlp"] = dense["mlp"] * tokens * cost.mlp_row
    parts["router"] = len(work) * tokens * cost.router_row
    parts["padding"] = dense["attention"] * (computed - needed) * cost.attention_pair
    parts["head"] = tokens * cost.head_row
    for each in work:
        for part, flops in _of_unit(cost, routing, each).items():
            parts[part] += flops
    return parts


def _has(part: Part, branch: str) -> bool:
    return part in ("layer", branch)


def _of_unit(cost: ForwardCost, routing: RoutingConfig, work: UnitWork) -> dict[str, int]:
    if routing.router == "moe":
        return {"mlp": work.rows * cost.expert_row}
    attention, mlp = (_has(work.unit.part, branch) for branch in ("attention", "mlp"))
    thrown_away = (work.rows - work.kept) * (attention * cost.query_output_row + mlp * cost.mlp_row)
    return {
        "query_output": attention * work.kept * cost.query_output_row,
        "attention": attention * work.needed_pairs * cost.attention_pair,
        "mlp": mlp * work.kept * cost.mlp_row,
        "padding": thrown_away + attention * (work.pairs - work.needed_pairs) * cost.attention_pair,
    }


def overflow_forward(model: ModelConfig, routing: RoutingConfig, sequence_length: int, work: Sequence[UnitWork]) -> int:
    """FLOPs that the rows over capacity would have cost, each with the mean number of keys; no part of the executed."""
    cost, total = forward_cost(model, routing), 0
    for each in work:
        pairs = each.overflow * (sequence_length + 1) // 2
        dropped = UnitWork(each.unit, each.overflow, each.overflow, pairs, pairs)
        total += sum(_of_unit(cost, routing, dropped).values())
    return total


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step, forward and backward, all ranks."""

    parts: dict[str, float]
    """Executed, by EXECUTED_PARTS."""
    overflow: float
    """What the rows over capacity would have cost; not executed."""
    dense: float
    """When every token executes every layer."""

    @property
    def executed(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


def training_flops(
    model: ModelConfig,
    routing: RoutingConfig,
    rows: int,
    sequence_length: int,
    work: Sequence[UnitWork],
    dense_pairs: tuple[int, int] | None = None,
) -> StepFlops:
    """FLOPs of a step over `rows` sequences; arguments as in executed_forward."""
    executed = executed_forward(model, routing, rows, sequence_length, work, dense_pairs)
    dense = dense_forward(model, rows, sequence_length, None if dense_pairs is None else dense_pairs[0])
    return StepFlops(
        parts={part: float(TRAINING_FACTOR * flops) for part, flops in executed.items()},
        overflow=float(TRAINING_FACTOR * overflow_forward(model, routing, sequence_length, work)),
        dense=float(TRAINING_FACTOR * dense),
    )
