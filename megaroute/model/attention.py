"""Attention: of every position, and of chosen query positions to all earlier ones.

Shapes: S sequence, s this tensor rank's slice of it under sequence parallelism, B batch, H hidden, D head width,
n query heads and G key-value heads of this tensor rank, R computed rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megaroute.routing.dispatch import gather
from megaroute.routing.plan import Plan

QUERY_BLOCK = 256
"""Query rows of one attention call on the CPU: keys after a block's last position are not touched."""


def causal_attention(q_SBnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
    """Causal attention of every position; query heads share key-value heads in order.  Returns [S, B, n * D]."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBnD, k_SBGD, v_SBGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3).flatten(2)


def chosen_attention(q_RnD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, plan: Plan) -> Tensor:
    """Attention of chosen queries, sorted by sample and position, each to the keys up to its own position.

    Returns [R, n * D] in the same order.
    """
    outs, start = [], 0
    for sample, rows in enumerate(plan.per_sample):
        q = q_RnD[start : start + rows].transpose(0, 1)[None]
        k, v = (t[:, sample].transpose(0, 1)[None] for t in (k_SBGD, v_SBGD))
        positions = plan.positions_R[start : start + rows]
        outs += [_attend_block(q, k, v, positions, block) for block in _blocks(rows, q.device)]
        start += rows
    return torch.cat(outs).flatten(1)


def _blocks(rows: int, device: torch.device) -> list[slice]:
    # Reading a block's last position stalls an accelerator; there one call masks the whole sample.
    size = QUERY_BLOCK if device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _attend_block(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, block: slice) -> Tensor:
    at = positions[block]
    keys = int(at[-1]) + 1 if q.device.type == "cpu" else k.shape[2]
    visible = torch.arange(keys, device=q.device) <= at[:, None]
    out = F.scaled_dot_product_attention(
        q[:, :, block], k[:, :, :keys], v[:, :, :keys], attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def causal_pairs(batch: int, seq: int) -> int:
    """Query-key pairs of causal attention over `batch` sequences of `seq` tokens."""
    return batch * seq * (seq + 1) // 2


def attention_pairs(plan: Plan, seq: int, device: torch.device) -> int:
    """Query-key pairs that `chosen_attention` computes for a plan over sequences of `seq` tokens."""
    pairs, start = 0, 0
    for rows in plan.per_sample:
        positions = plan.positions_R[start : start + rows]
        for block in _blocks(rows, device):
            keys = int(positions[block][-1]) + 1 if device.type == "cpu" else seq
            pairs += (block.stop - block.start) * keys
        start += rows
    return pairs


class CausalCoreAttention(torch.nn.Module):
    """Core attention of dense layers, by torch's scaled_dot_product_attention.  Document boundaries are not masked."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [S, B, n, D], key and value [S, B, G, D] -> [S, B, n * D]."""
        return causal_attention(query, key, value)


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

    def _column(self, linear: type, width: int) -> ColumnParallelLinear:
        built = linear(
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        built.explicit_expert_comm = True  # its input is gathered once for both products, in forward
        return built

    def get_query_key_value_tensors(self, *_: Any, **__: Any) -> None:
        """Abstract in Attention; the forward pass below does not go through it."""
        raise AssertionError("RoutedSelfAttention computes queries apart from keys and values")

    def forward(self, h_sBH: Tensor, plan: Plan | None, rotary_pos_emb: Tensor) -> Tensor:
        """Attention output of the rows of `plan`, or of every token when it is None.

        Args:
            h_sBH: normed input, this rank's slice under sequence parallelism.
            plan: rows of the whole sequence to compute queries for.
            rotary_pos_emb: angles [S, 1, 1, D].

        Returns:
            [R / T, H]: under sequence parallelism the rows of this rank's chunk, else all; [s, B, H] without a plan.
        """
        h_SBH = self._every_token(h_sBH)
        k, v = self._keys_values(h_SBH, rotary_pos_emb)
        if plan is None:
            q = self._queries(h_SBH, rotary_pos_emb)
            context = self._core(lambda q, k, v: causal_attention(q, k, v), q, k, v)
            return self.linear_proj(context)[0]
        q = self._chosen_queries(h_SBH, plan, rotary_pos_emb)
        context = self._core(lambda q, k, v: chosen_attention(q, k, v, plan), q, k, v)
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
        k, v = kv.view(*kv.shape[:2], -1, 2 * width).split(width, -1)
        return apply_rotary_pos_emb(k, rotary_pos_emb, config=self.config), v

    def _queries(self, h_SBH: Tensor, rotary_pos_emb: Tensor) -> Tensor:
        q, _ = self.linear_q(h_SBH)
        q = q.view(*q.shape[:2], -1, self.hidden_size_per_attention_head)
        return apply_rotary_pos_emb(q, rotary_pos_emb, config=self.config)

    def _chosen_queries(self, h_SBH: Tensor, plan: Plan, rotary_pos_emb: Tensor) -> Tensor:
        q, _ = self.linear_q(gather(h_SBH, plan.rows_R))
        q = q if plan.order_R is None else q.index_select(0, plan.order_R)
        q = q.view(q.shape[0], 1, -1, self.hidden_size_per_attention_head)
        angles = rotary_pos_emb.index_select(0, plan.positions_R)
        return apply_rotary_pos_emb(q, angles, config=self.config)[:, 0]

    def _core(self, attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(attend, False, q, k, v)
        return attend(q, k, v)
