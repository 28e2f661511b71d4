"""One router, and the dispatch of what it keeps.  Shapes as in attention.py; K kept rows of this rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.model.chosen_attention import attention_pairs, every_row
from megaroute.model.flops import causal_pairs
from megaroute.routing.capacity import MULTIPLE, capacity_plan, capacity_rows, limit
from megaroute.routing.context import RoutingContext, UnitRecord
from megaroute.routing.dispatch import combine, combine_masked, take
from megaroute.routing.gate import Gate
from megaroute.routing.plan import Plan, make_plan
from megaroute.routing.routers import Place, build_router

Compute = Callable[[Tensor, Tensor, Plan | None], Tensor]
"""(x_RH, h_sBH, plan) -> [R, H], what the unit adds to x_RH; R are all local rows when the plan is None."""


@dataclass(frozen=True)
class Decision:
    """Who is executed, and how that came about."""

    keep_SB: Tensor
    """bool, the whole sequence."""
    margin_sB: Tensor | None
    wanted_sB: Tensor | None = None
    """bool, this rank's slice of what the router chose, where a capacity may have dropped some of it."""

    @classmethod
    def of(cls, record: UnitRecord) -> "Decision":
        """The decision of a forward pass."""
        return cls(record.keep_SB, record.margin_SB, record.wanted_sB)

    def recorded(self, keep_sB: Tensor, rows: int, pairs: int | Tensor, probability: Tensor | None) -> UnitRecord:
        """Its record, with what was computed for it."""
        return UnitRecord(
            keep_SB=self.keep_SB,
            margin_SB=self.margin_sB,
            rows=rows,
            attention_pairs=pairs,
            overflow=None if self.wanted_sB is None else self.wanted_sB.sum() - keep_sB.sum(),
            probability=probability,
            wanted_sB=self.wanted_sB,
        )


class RoutedUnit(nn.Module):
    """y = x + g * (Block(x) - x) with one decision g per token.

    A skipped token passes through untouched.  A unit that keeps no token still computes one row and discards it, so
    that its parameters and collectives take part on every rank.
    """

    def __init__(self, routing: RoutingConfig, unit: Unit, target: float, config: Any, tp_group: Any) -> None:
        super().__init__()
        self.routing, self.unit = routing, unit
        self.router = build_router(routing, unit, target, config.hidden_size, config.params_dtype)
        for weight in self.router.parameters():
            # Each tensor rank routes other tokens under sequence parallelism: gradients are summed over them.
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._group, self._sequence_parallel = tp_group, config.sequence_parallel

    def forward(
        self,
        x_sBH: Tensor,
        h_sBH: Tensor,
        compute: Compute,
        context: RoutingContext,
        starts_SB: Tensor | None = None,
    ) -> Tensor:
        """Route the tokens `x_sBH` by their normed values `h_sBH`, and compute what is kept.

        `starts_SB` says how far attention reaches back, see MicroBatch; here it only matters for counting pairs.
        """
        place = self.place
        logit_sB = self.router.logits(h_sBH)
        record = context.records.get(self.unit.key)
        made = self._decide(logit_sB, h_sBH, context) if record is None else Decision.of(record)
        # A recomputation repeats the decisions of its forward pass.
        plan = self._plan(made.keep_SB, context.step)
        keep_sB = place.slice(made.keep_SB)
        gate_sB = self.router.gate(logit_sB, keep_sB if made.wanted_sB is None else made.wanted_sB, place, context)
        if record is None:
            pairs = self._pairs(plan, made.keep_SB, starts_SB)
            mean = None if gate_sB is None else context.mean(gate_sB.detach(), self._real(context), place.chunks)
            context.records[self.unit.key] = made.recorded(keep_sB, plan.rows_R.numel(), pairs, mean)
        gate = self._gate(gate_sB, keep_sB, context)
        if self.routing.dispatch.mode == "masked":
            return self._masked(x_sBH, h_sBH, keep_sB, gate, compute)
        return self._computed(x_sBH, h_sBH, plan, keep_sB, gate, compute)

    def note_rows(self, context: RoutingContext, rows: int) -> None:
        """Correct the record when each tensor rank computed `rows` rows instead of those of its plan."""
        record = context.records[self.unit.key]
        context.records[self.unit.key] = replace(record, rows=rows * self.place.chunks)

    @property
    def place(self) -> Place:
        """Which slice of the sequence this rank routes."""
        if not self._sequence_parallel:
            return Place()
        return Place(self._group.rank(), self._group.size(), self._whole)

    def _whole(self, slice_sB: Tensor) -> Tensor:
        sent = slice_sB.to(torch.uint8) if slice_sB.dtype == torch.bool else slice_sB
        return gather_from_sequence_parallel_region(sent.contiguous(), group=self._group).to(slice_sB.dtype)

    @property
    def _limited(self) -> bool:
        # Inference drops nothing: who overflows depends on later tokens.
        return self.training and self.routing.dispatch.mode == "capacity"

    def _decide(self, logit_sB: Tensor | None, h_sBH: Tensor, context: RoutingContext) -> Decision:
        place = self.place
        choice = self.router.decide(logit_sB, h_sBH, place, context)
        real_sB = self._real(context)
        wanted_sB = choice.keep_sB if real_sB is None else choice.keep_sB & real_sB
        if not self._limited:
            return Decision(place.whole(wanted_sB), choice.margin_sB)
        margin_sB = wanted_sB.float() if choice.margin_sB is None else choice.margin_sB
        share = self._rows(h_sBH.shape[0], context.step)
        if self.routing.capacity.scope == "stage":
            kept_sB = context.pool.limit(wanted_sB, margin_sB, share)
        else:
            kept_sB = limit(wanted_sB, margin_sB, share)
        return Decision(place.whole(kept_sB), choice.margin_sB, wanted_sB)

    def _real(self, context: RoutingContext) -> Tensor | None:
        return None if context.real_SB is None else self.place.slice(context.real_SB)

    def _rows(self, tokens: int, step: int) -> int:
        return capacity_rows(self.routing.capacity.factor, self.router.target_at(step), tokens)

    def _plan(self, keep_SB: Tensor, step: int) -> Plan:
        chunks = self.place.chunks
        if self.routing.dispatch.mode == "masked":
            return make_plan(torch.ones_like(keep_SB))
        if not self._limited:
            return make_plan(keep_SB, chunks)
        if self.routing.capacity.scope == "stage":
            return make_plan(keep_SB, chunks, multiple=MULTIPLE)
        return capacity_plan(keep_SB, self._rows(keep_SB.shape[0] // chunks, step), chunks)

    def _pairs(self, plan: Plan, keep_SB: Tensor, starts_SB: Tensor | None) -> int | Tensor:
        if self.unit.part == "mlp":
            return 0
        seq, batch = keep_SB.shape
        if plan.everything and starts_SB is None:  # plainly causal, see _computed
            return causal_pairs(batch, seq)
        if plan.everything:  # as CausalCoreAttention does it
            plan = every_row(seq, batch, keep_SB.device)
        return attention_pairs(plan, seq, keep_SB.device, starts_SB)

    def _gate(self, gate_sB: Tensor | None, keep_sB: Tensor, context: RoutingContext) -> Gate:
        curvature = 0.0
        if self.routing.benefit == "second_order" and context.budget_scale > 0:
            tokens = context.mean_tokens or keep_sB.numel() * self.place.chunks
            curvature = tokens / context.budget_scale
        return Gate(None if gate_sB is None else gate_sB.reshape(-1), self.router.multiplies, curvature)

    def _computed(self, x: Tensor, h: Tensor, plan: Plan, keep_sB: Tensor, gate: Gate, compute: Compute) -> Tensor:
        """The unit for the rows of the plan."""
        if plan.everything:  # nothing to gather or put back
            y = self._every_token(x, h, gate, compute)
            return y if plan.kept is not None else combine_masked(x, keep_sB, y)
        place = self.place
        rows, kept, valid = plan.local(place.chunk)
        rows = rows - place.chunk * x.shape[0] * x.shape[1]
        x_KH, rest = take(x, rows, kept)
        branch_KH = compute(x_KH, h, plan)
        if kept is not None and kept < rows.numel():
            branch_KH, x_KH, rows = branch_KH[:kept], x_KH[:kept], rows[:kept]
        out_KH = gate.rows(rows)(x_KH, branch_KH)
        if valid is not None:
            out_KH = torch.where(valid[:, None], out_KH, x_KH)
        return combine(rest, rows, out_KH)

    def _masked(self, x: Tensor, h: Tensor, keep_sB: Tensor, gate: Gate, compute: Compute) -> Tensor:
        """The same function with every token computed: the reference that the other modes are tested against."""
        if self.routing.gradient == "all" and gate.value_N is not None:
            branch = compute(x.reshape(-1, x.shape[-1]), h, None)
            # A zero, through which the gates of skipped tokens get a gradient from branches that nobody else sees.
            zero_NH = (gate.value_N - gate.value_N.detach())[:, None].to(x.dtype)
            unseen = branch.detach().view_as(x).masked_fill(keep_sB[..., None], 0.0) * zero_NH.view(*x.shape[:2], 1)
            return combine_masked(x, keep_sB, gate(x.reshape(-1, x.shape[-1]), branch).view_as(x)) + unseen
        return combine_masked(x, keep_sB, self._every_token(x, h, gate, compute))

    def _every_token(self, x: Tensor, h: Tensor, gate: Gate, compute: Compute) -> Tensor:
        """Block(x) of all tokens, in their own order, with the gradient of their gates."""
        x_NH = x.reshape(-1, x.shape[-1])
        return gate(x_NH, compute(x_NH, h, None)).view_as(x)
