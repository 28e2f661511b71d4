"""The routed layer: the one seam between routing and Megatron-core.

Shapes as in attention.py; K kept rows of this rank.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megaroute.config.routing import RoutingConfig
from megaroute.model.attention import attention_pairs, causal_pairs
from megaroute.model.microbatch import MicroBatch
from megaroute.routing.budget import pull
from megaroute.routing.context import RoutingContext, UnitRecord
from megaroute.routing.dispatch import combine, combine_masked, gather, straight_through
from megaroute.routing.modes import forced_decisions
from megaroute.routing.noise import logistic, uniform
from megaroute.routing.plan import Plan, make_plan
from megaroute.routing.router import BinaryRouter


class RoutedLayer(TransformerLayer):
    """y = x + g * (Block(x) - x) with one binary decision g per token.

    K and V are computed for every token; Q, attention output and MLP for executed tokens only, at their own positions.
    A skipped token passes through untouched.  A layer that keeps no token still computes one row and discards it, so
    that its parameters and collectives take part on every rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        routing: RoutingConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.routing = routing or RoutingConfig()
        self.unit = self.layer_number - 1
        self.router = BinaryRouter(config.hidden_size, config.params_dtype)
        # Each tensor rank routes other tokens under sequence parallelism: gradients are summed over them.
        self.router.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: MicroBatch | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, B, H] -> ([s, B, H], None).

        `packed_seq_params` is the micro-batch whose `routing` is read and filled; without one nothing is recorded.
        """
        assert rotary_pos_emb is not None
        context = packed_seq_params.routing if packed_seq_params is not None else RoutingContext()
        h = self.input_layernorm(hidden_states)
        logit = self.router(h)
        keep_SB, margin = self._decide(logit, context)
        probability = self._probability(logit, keep_SB, context)
        if self.routing.dispatch.mode == "masked":
            return self._masked(hidden_states, h, keep_SB, margin, probability, rotary_pos_emb, context), None
        plan = make_plan(keep_SB, self._chunks)
        self._record(context, keep_SB, margin, plan)
        return self._exact(hidden_states, h, plan, probability, rotary_pos_emb), None

    @property
    def _chunks(self) -> int:
        return self.tp_group.size() if self.config.sequence_parallel else 1

    @property
    def _chunk(self) -> int:
        return self.tp_group.rank() if self.config.sequence_parallel else 0

    def _decide(self, logit_sB: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor | None]:
        """Decisions for the whole sequence, bool [S, B], and the margin of this rank's slice."""
        if self.unit in context.records:  # a recomputation repeats the decisions of its forward pass
            record = context.records[self.unit]
            return record.keep_SB, record.margin_SB
        if self.unit in context.replay:
            return context.replay[self.unit], None
        seq, batch = logit_sB.shape
        positions = torch.arange(seq, device=logit_sB.device) + self._chunk * seq
        if self.routing.force is not None:
            keep, margin = forced_decisions(self.routing.force, positions, batch, self.routing.density), None
        else:
            margin = logit_sB.detach()
            if self.training:
                samples = context.samples_B.to(logit_sB.device)
                margin = margin + logistic(uniform(context.seed, context.step, self.unit, samples, positions))
            keep = margin > 0
        if self._chunks > 1:
            keep = gather_from_sequence_parallel_region(keep.to(torch.uint8), group=self.tp_group).bool()
        return keep, margin

    def _probability(self, logit_sB: Tensor, keep_SB: Tensor, context: RoutingContext) -> Tensor:
        """Softmax probability of executing, [s, B]; its gradient already has the budget's pull in it."""
        probability = torch.sigmoid(logit_sB / self.routing.temperature)
        if self.routing.force is not None or self.unit in context.replay:
            # Nothing to learn from a decision that was not the router's; it still takes part in the backward pass.
            return probability.detach() + 0.0 * probability
        budget = self.routing.budget
        if not self.training or budget.weight == 0:
            return probability
        density = self.router.state.density if budget.estimator == "global" else keep_SB.float().mean()
        return pull(probability, density, self.routing.density, budget.weight, context.budget_scale, keep_SB.numel())

    def _exact(self, x: Tensor, h: Tensor, plan: Plan, probability: Tensor, rotary: Tensor) -> Tensor:
        if plan.everything:  # nothing to gather or put back
            return self._every_token(x, h, probability, rotary)
        rows, kept = plan.local(self._chunk)
        rows = rows - self._chunk * x.shape[0] * x.shape[1]
        x_RH = gather(x, rows)
        out_RH = self._branches(x_RH, h, plan, rotary)
        probability_K = probability.reshape(-1).index_select(0, rows[:kept])
        out_KH = straight_through(out_RH[:kept], x_RH[:kept], probability_K)
        return combine(x, rows[:kept], out_KH)

    def _masked(
        self,
        x: Tensor,
        h: Tensor,
        keep_SB: Tensor,
        margin: Tensor | None,
        probability: Tensor,
        rotary: Tensor,
        context: RoutingContext,
    ) -> Tensor:
        """The same function with every token computed: the reference that `exact` is tested against."""
        self._record(context, keep_SB, margin, make_plan(torch.ones_like(keep_SB)))
        keep = keep_SB[self._chunk * x.shape[0] : (self._chunk + 1) * x.shape[0]]
        return combine_masked(x, keep, self._every_token(x, h, probability, rotary))

    def _every_token(self, x: Tensor, h: Tensor, probability: Tensor, rotary: Tensor) -> Tensor:
        """Block(x) of all tokens, in their own order, with the gradient of their gates."""
        x_RH = x.reshape(-1, x.shape[-1])
        out_RH = self._branches(x_RH, h, None, rotary)
        return straight_through(out_RH, x_RH, probability.reshape(-1)).view_as(x)

    def _branches(self, x_RH: Tensor, h: Tensor, plan: Plan | None, rotary: Tensor) -> Tensor:
        """Both residual branches for the rows `x_RH`."""
        x_RH = x_RH + self.self_attention(h, plan, rotary).view_as(x_RH)
        if self.recompute_mlp and self.training:
            return x_RH + tensor_parallel.checkpoint(self._mlp, False, x_RH)
        return x_RH + self._mlp(x_RH)

    def _mlp(self, x_RH: Tensor) -> Tensor:
        return self.mlp(self.pre_mlp_layernorm(x_RH)[:, None])[0][:, 0]

    def _record(self, context: RoutingContext, keep_SB: Tensor, margin: Tensor | None, plan: Plan) -> None:
        if self.unit not in context.records:
            seq, batch = keep_SB.shape
            # A plan of everything is computed without blocks, see _exact.
            pairs = causal_pairs(batch, seq) if plan.everything else attention_pairs(plan, seq, keep_SB.device)
            context.records[self.unit] = UnitRecord(keep_SB, margin, plan.rows_R.numel(), pairs)
