"""Attention: of every position, and of chosen query positions to all earlier ones.

Shapes: S sequence, s this tensor rank's slice of it under sequence parallelism, B batch, H hidden, D head width,
n query heads and G key-value heads of this tensor rank, R computed rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megaroute.model.chosen_attention import causal_attention, chosen_attention
from megaroute.model.microbatch import MicroBatch
from megaroute.model.norm import RMSNorm
from megaroute.model.rotary import rotate, rotate_keys
from megaroute.routing.dispatch import gather_along
from megaroute.routing.plan import Plan


class CausalCoreAttention(torch.nn.Module):
    """Core attention of dense layers, by torch's scaled_dot_product_attention."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: MicroBatch | None = None, **__: Any
    ) -> Tensor:
        """query [S, B, n, D], key and value [S, B, G, D] -> [S, B, n * D]; within documents if the micro-batch says."""
        starts_SB = None if packed_seq_params is None else packed_seq_params.starts_SB
        return causal_attention(query, key, value, starts_SB)


@dataclass
class RoutedAttentionSubmodules:
    """Linears of RoutedSelfAttention."""

    linear_q: type = ColumnParallelLinear
    linear_kv: type = ColumnParallelLinear
    core_attention: type = CausalCoreAttention
    linear_proj: type = RowParallelLinear


class RoutedSelfAttention(Attention):
    """Self-attention with keys and values for every token and queries for chosen ones only.

    Megatron-core's SelfAttention projects Q, K and V of every token in one product; here Q is apart, so that it can be
    computed for some rows.  K and V rows of one head are adjacent: [k_0, v_0, k_1, v_1, ..].
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: RoutedAttentionSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_q = self._column(submodules.linear_q, self.query_projection_size)
        self.linear_kv = self._column(submodules.linear_kv, 2 * self.kv_projection_size)
        # Megatron-core sums the gradients of these over tensor ranks, which hold other heads, by their names.
        self.q_layernorm = self._norm() if config.qk_layernorm else None
        self.k_layernorm = self._norm() if config.qk_layernorm else None

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config, self.hidden_size_per_attention_head, self.config.layernorm_epsilon)

    def _column(self, linear: type, width: int) -> ColumnParallelLinear:
        built = linear(
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=self.config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        built.explicit_expert_comm = True  # its input is gathered once for both products, in forward
        return built

    def get_query_key_value_tensors(self, *_: Any, **__: Any) -> None:
        """Abstract in Attention; the forward pass below does not go through it."""
        raise AssertionError("RoutedSelfAttention computes queries apart from keys and values")

    def forward(
        self, h_sBH: Tensor, plan: Plan | None, rotary_pos_emb: Tensor, starts_SB: Tensor | None = None
    ) -> Tensor:
        """Attention output of the rows of `plan`, or of every token when it is None.

        Args:
            h_sBH: normed input, this rank's slice under sequence parallelism.
            plan: rows of the whole sequence to compute queries for.
            rotary_pos_emb: angles [S, 1, 1, D].
            starts_SB: int32, position at which the document of each token of the whole sequence starts; None to attend
                across documents.

        Returns:
            [R / T, H]: under sequence parallelism the rows of this rank's chunk, else all; [s, B, H] without a plan.
        """
        h_SBH = self._every_token(h_sBH)
        if plan is None:
            k, v = self._keys_values(h_SBH, rotary_pos_emb)
            q = self._queries(h_SBH, rotary_pos_emb)
            context = self._core(lambda q, k, v: causal_attention(q, k, v, starts_SB), q, k, v)
            return self.linear_proj(context)[0]
        h_RH, h_SBH = gather_along(h_SBH, plan.rows_R)
        k, v = self._keys_values(h_SBH, rotary_pos_emb)
        q = self._chosen_queries(h_RH, plan, rotary_pos_emb)
        context = self._core(lambda q, k, v: chosen_attention(q, k, v, plan, starts_SB), q, k, v)
        if plan.order_R is not None:
            context = torch.empty_like(context).index_copy(0, plan.order_R, context)
        return self.linear_proj(context[:, None])[0][:, 0]

    def _every_token(self, h_sBH: Tensor) -> Tensor:
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(h_sBH, group=group)
        return copy_to_tensor_model_parallel_region(h_sBH, group=group)

    def _keys_values(self, h_SBH: Tensor, rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
        width = self.hidden_size_per_attention_head
        kv, _ = self.linear_kv(h_SBH)
        if self.config.num_query_groups < self.world_size:
            kv = self._shared_group(kv)
        kv = kv.view(*kv.shape[:2], -1, 2 * width)
        if self.k_layernorm is None:
            return rotate_keys(kv, rotary_pos_emb)
        k, v = kv.chunk(2, -1)
        return rotate(self.k_layernorm(k), rotary_pos_emb), v

    def _shared_group(self, kv_SBh: Tensor) -> Tensor:
        """The one key-value head that this rank's queries use, where there are fewer heads than tensor ranks.

        As in Megatron-core's SelfAttention each rank holds an equal part of all heads' weights and the products are
        gathered, whose backward pass sums the gradients of the ranks that share a head.  So weights, gradients and
        checkpoints are cut like any other matrix.
        """
        kv_SBH = all_gather_last_dim_from_tensor_parallel_region(kv_SBh, group=self.pg_collection.tp)
        groups = self.config.num_query_groups
        return kv_SBH.chunk(groups, -1)[self.pg_collection.tp.rank() * groups // self.world_size]

    def _queries(self, h_SBH: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        q, _ = self.linear_q(h_SBH)
        return rotate(self._heads(q), rotary_pos_emb)

    def _chosen_queries(self, h_RH: Tensor, plan: Plan, rotary_pos_emb: Tensor) -> Tensor:
        q, _ = self.linear_q(h_RH)
        q = q if plan.order_R is None else q.index_select(0, plan.order_R)
        return rotate(self._heads(q), rotary_pos_emb[:, 0].index_select(0, plan.positions_R))

    def _heads(self, q: Tensor) -> Tensor:
        """[.., n * D] -> [.., n, D], normed where the model does that."""
        q = q.view(*q.shape[:-1], -1, self.hidden_size_per_attention_head)
        return q if self.q_layernorm is None else self.q_layernorm(q)

    def _core(self, attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(attend, False, q, k, v)
        return attend(q, k, v)
