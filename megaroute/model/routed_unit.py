"""One router, and the dispatch of what it keeps.  Shapes as in attention.py; K kept rows of this rank."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megaroute.config.routing import RoutingConfig
from megaroute.config.units import Unit
from megaroute.model.chosen_attention import attention_pairs
from megaroute.model.flops import causal_pairs
from megaroute.routing.capacity import capacity_plan, capacity_rows, limit, limit_total
from megaroute.routing.context import RoutingContext, UnitRecord
from megaroute.routing.dispatch import combine, combine_masked, straight_through, take, weighted
from megaroute.routing.plan import Plan, make_plan
from megaroute.routing.routers import Place, build_router

Compute = Callable[[Tensor, Tensor, Plan | None], Tensor]
"""(x_RH, h_sBH, plan) -> [R, H], what the unit adds to x_RH; R are all local rows when the plan is None."""


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
        if record is None:
            keep_SB, margin_sB, overflow = self._decide(logit_sB, h_sBH, context)
        else:  # a recomputation repeats the decisions of its forward pass
            keep_SB = record.keep_SB
        plan = self._plan(keep_SB, context.step)
        keep_sB = place.slice(keep_SB)
        gate_sB = self.router.gate(logit_sB, keep_sB, place, context)
        if record is None:
            probability = None if gate_sB is None else gate_sB.detach().mean()
            pairs = self._pairs(plan, keep_SB, starts_SB)
            context.records[self.unit.key] = UnitRecord(
                keep_SB, margin_sB, plan.rows_R.numel(), pairs, overflow, probability
            )
            if self._pools:
                context.pool.take(self._share(keep_SB, context.step), plan.rows_per_chunk)
        if self.routing.dispatch.mode == "masked":
            return self._masked(x_sBH, h_sBH, keep_sB, gate_sB, compute)
        return self._computed(x_sBH, h_sBH, plan, keep_sB, gate_sB, compute)

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

    @property
    def _pools(self) -> bool:
        return self._limited and self.routing.capacity.scope == "stage"

    def _decide(
        self, logit_sB: Tensor | None, h_sBH: Tensor, context: RoutingContext
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decisions for the whole sequence, and the margins and the number of dropped tokens of this slice."""
        place = self.place
        choice = self.router.decide(logit_sB, h_sBH, place, context)
        wanted_sB = choice.keep_sB
        if not self._limited:
            return place.whole(wanted_sB), choice.margin_sB, None
        margin_sB = wanted_sB.float() if choice.margin_sB is None else choice.margin_sB
        if self._pools:
            keep_SB = self._pooled(place.whole(wanted_sB), place.whole(margin_sB), context)
        else:
            keep_SB = place.whole(limit(wanted_sB, margin_sB, self._rows(h_sBH.shape[0], context.step)))
        return keep_SB, choice.margin_sB, wanted_sB.sum() - place.slice(keep_SB).sum()

    def _rows(self, tokens: int, step: int) -> int:
        return capacity_rows(self.routing.capacity.factor, self.router.target_at(step), tokens)

    def _pooled(self, keep_SB: Tensor, margin_SB: Tensor, context: RoutingContext) -> Tensor:
        """The decisions that the stage still has rows for; a chunk's rows are those of the fullest one."""
        chunks = self.place.chunks
        offered = context.pool.offer(self._share(keep_SB, context.step), keep_SB.numel() // chunks)
        kept = [
            limit_total(keep, margin, offered)
            for keep, margin in zip(keep_SB.chunk(chunks), margin_SB.chunk(chunks), strict=True)
        ]
        return torch.cat(kept)

    def _share(self, keep_SB: Tensor, step: int) -> int:
        """Rows of a chunk that this unit brings into its stage's pool."""
        return self._rows(keep_SB.numel() // self.place.chunks, step)

    def _plan(self, keep_SB: Tensor, step: int) -> Plan:
        chunks = self.place.chunks
        if self.routing.dispatch.mode == "masked":
            return make_plan(torch.ones_like(keep_SB))
        if not self._limited:
            return make_plan(keep_SB, chunks)
        if self._pools:
            return make_plan(keep_SB, chunks, multiple=16)
        return capacity_plan(keep_SB, self._rows(keep_SB.shape[0] // chunks, step), chunks)

    def _pairs(self, plan: Plan, keep_SB: Tensor, starts_SB: Tensor | None) -> int | Tensor:
        if self.unit.part == "mlp":
            return 0
        seq, batch = keep_SB.shape
        if plan.everything and starts_SB is None:  # plainly causal, see _computed
            return causal_pairs(batch, seq)
        return attention_pairs(plan, seq, keep_SB.device, starts_SB)

    def _computed(
        self, x: Tensor, h: Tensor, plan: Plan, keep_sB: Tensor, gate: Tensor | None, compute: Compute
    ) -> Tensor:
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
        out_KH = self._gated(x_KH, branch_KH, None if gate is None else gate.reshape(-1).index_select(0, rows))
        if valid is not None:
            out_KH = torch.where(valid[:, None], out_KH, x_KH)
        return combine(rest, rows, out_KH)

    def _masked(self, x: Tensor, h: Tensor, keep_sB: Tensor, gate: Tensor | None, compute: Compute) -> Tensor:
        """The same function with every token computed: the reference that the other modes are tested against."""
        if self.routing.gradient == "all" and gate is not None:
            branch = compute(x.reshape(-1, x.shape[-1]), h, None).view_as(x)
            # A zero, through which the gates of skipped tokens get a gradient from branches that nobody else sees.
            unseen = branch.detach().masked_fill(keep_sB[..., None], 0.0) * (gate - gate.detach())[..., None].to(
                x.dtype
            )
            return combine_masked(x, keep_sB, straight_through(x, branch, gate)) + unseen
        return combine_masked(x, keep_sB, self._every_token(x, h, gate, compute))

    def _every_token(self, x: Tensor, h: Tensor, gate: Tensor | None, compute: Compute) -> Tensor:
        """Block(x) of all tokens, in their own order, with the gradient of their gates."""
        x_RH = x.reshape(-1, x.shape[-1])
        branch_RH = compute(x_RH, h, None)
        return self._gated(x_RH, branch_RH, None if gate is None else gate.reshape(-1)).view_as(x)

    def _gated(self, x_KH: Tensor, branch_KH: Tensor, gate_K: Tensor | None) -> Tensor:
        if gate_K is None:
            return x_KH + branch_KH
        if self.router.multiplies:
            return weighted(x_KH, branch_KH, gate_K)
        return straight_through(x_KH, branch_KH, gate_K)
