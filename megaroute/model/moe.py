"""A dense layer whose MLP is a mixture of experts: the one seam between routing/experts.py and Megatron-core.

Shapes: S sequence, s this tensor rank's slice of it under sequence parallelism, B batch, H hidden, E experts, R pairs
of token and expert that are computed.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.distributed import ProcessGroup

from megaroute.config.root import Config
from megaroute.config.routers import MoeConfig
from megaroute.config.sizes import expert_width
from megaroute.config.units import Unit
from megaroute.model.microbatch import MicroBatch
from megaroute.routing.context import RoutingContext
from megaroute.routing.dispatch import gather
from megaroute.routing.experts import (
    ExpertRecord,
    ExpertRouter,
    balance,
    choose,
    expert_capacity,
    expert_plan,
    gates,
    limit,
    sample_shares,
)
from megaroute.routing.gate import scaled


class Expert(MLP):
    """Megatron-core's MLP, cut over the tensor ranks as ever, but without communication: its result is a summand."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, width: int, group: ProcessGroup) -> None:
        config = copy.copy(config)
        config.ffn_hidden_size = width  # the second matrix takes its width from here, not from the argument
        super().__init__(config, submodules, ffn_hidden_size=width, tp_group=group)
        self.linear_fc1.explicit_expert_comm = True
        self.linear_fc2.explicit_expert_comm = True


class Experts(torch.nn.ModuleList):
    """The experts of a layer.

    Their input is gathered once and their sum reduced once for all of them, so that ranks exchange tensors of one size
    however the tokens fall on the experts.
    """

    def forward(self, rows_RH: Tensor, per_expert: tuple[int, ...]) -> Tensor:
        """This rank's share of the experts' outputs, [R, H]; the rows of one expert are adjacent.

        An expert without rows computes none, and gives its weights a gradient of zero.
        """
        parts = rows_RH[:, None].split(per_expert)
        return torch.cat([expert(part_RBH)[0] for expert, part_RBH in zip(self, parts, strict=True)])[:, 0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron-core's description for checkpoints; it would take an unknown container for replicated weights."""
        state: dict[str, Any] = {}
        for index, expert in enumerate(self):
            assert isinstance(expert, Expert)
            state |= expert.sharded_state_dict(f"{prefix}{index}.", sharded_offsets, metadata)
        return state


class ExpertMLP(MegatronModule):
    """Router and experts: y = sum over the chosen experts of gate * expert(h)."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, moe: MoeConfig, width: int, group: ProcessGroup
    ) -> None:
        super().__init__(config)
        self.moe, self.tp_group = moe, group
        self.router = ExpertRouter(config.hidden_size, moe.experts, config.params_dtype)
        # Each tensor rank scores other tokens under sequence parallelism: gradients are summed over them.
        self.router.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.experts = Experts(Expert(config, submodules, width, group) for _ in range(moe.experts))

    def forward(self, h_sBH: Tensor, context: RoutingContext, key: int) -> Tensor:
        """[s, B, H] -> [s, B, H]; a token whose experts are full gets 0.

        The record goes into `context` under `key`; a recomputation, which finds one there, repeats its choices.
        """
        probability_SBE = self._whole(self.router(h_sBH))
        record = context.records.get(key)
        if not isinstance(record, ExpertRecord):
            record = context.records[key] = self._choose(probability_SBE)
        probability_SBE = self._balanced(probability_SBE, record, context.budget_scale)
        plan = expert_plan(record.kept_SBE)
        gate_R = gates(probability_SBE, record.chosen_SBE, self.moe.top_k).flatten().index_select(0, plan.slots_R)
        h_SBH = self._whole(h_sBH)
        out_RH = self.experts(gather(h_SBH, plan.rows_R), plan.per_expert)
        out_NH = torch.zeros_like(h_SBH).flatten(0, 1).index_add(0, plan.rows_R, scaled(out_RH, gate_R))
        return self._reduced(out_NH.view_as(h_SBH))

    def _balanced(self, probability_SBE: Tensor, record: ExpertRecord, scale: float) -> Tensor:
        weight = self.moe.balance_weight
        if not self.training or weight == 0:
            return probability_SBE
        share = self.router.state.share_E
        if self.moe.balance_estimator == "sample":
            share = sample_shares(record.chosen_SBE)
        # Every tensor rank adds it, and the sum of their gradients flows on.
        return balance(probability_SBE, share, weight, scale / self.tp_group.size())

    def _choose(self, probability_SBE: Tensor) -> ExpertRecord:
        """Every tensor rank makes the same choice from the same probabilities."""
        seq, _, experts = probability_SBE.shape
        chosen = choose(probability_SBE, self.moe.top_k)
        kept = chosen
        if self.training:  # a limit would make a token's room depend on later ones
            capacity = expert_capacity(self.moe.capacity_factor, self.moe.top_k, seq, experts)
            kept = limit(probability_SBE, chosen, capacity)
        return ExpertRecord(
            keep_SB=kept.any(-1),
            margin_SB=None,
            rows=int(kept.sum()),
            overflow=(chosen & ~kept).chunk(self._chunks)[self._chunk].sum(),
            counts_E=chosen.sum((0, 1)),
            chosen_SBE=chosen,
            kept_SBE=kept,
            probability_E=probability_SBE.detach().mean((0, 1)),
        )

    @property
    def _chunks(self) -> int:
        return self.tp_group.size() if self.config.sequence_parallel else 1

    @property
    def _chunk(self) -> int:
        return self.tp_group.rank() if self.config.sequence_parallel else 0

    def _whole(self, x: Tensor) -> Tensor:
        """Of every token, for a computation of which each tensor rank does a share: its gradient is a share too."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _reduced(self, share_SBH: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(share_SBH, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(share_SBH, group=self.tp_group)


class ExpertLayer(TransformerLayer):
    """Megatron-core's dense layer with a mixture of experts for its MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        mlp: MLPSubmodules,
        moe: MoeConfig,
        width: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.key = Unit(self.layer_number - 1, "mlp").key
        self.mlp = ExpertMLP(config, mlp, moe, width, self.tp_group)

    @property
    def router(self) -> ExpertRouter:
        """The router of the experts."""
        return self.mlp.router

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
        context = packed_seq_params.routing if packed_seq_params is not None else RoutingContext()
        x, _ = self._forward_attention(
            hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )

        def mlp(x: Tensor) -> Tensor:
            return self.mlp(self.pre_mlp_layernorm(x), context, self.key)

        if self.recompute_mlp and self.training:
            return x + tensor_parallel.checkpoint(mlp, False, x), None
        return x + mlp(x), None


def expert_layer_spec(config: Config, dense: ModuleSpec) -> ModuleSpec:
    """The layer `dense`, a TransformerLayer with an MLP, with `routing.moe` in place of the MLP."""
    width = expert_width(config.model, config.routing)
    return ModuleSpec(
        module=ExpertLayer,
        params={"mlp": dense.submodules.mlp.submodules, "moe": config.routing.moe, "width": width},
        submodules=replace(dense.submodules, mlp=IdentityOp),
    )
