"""A causal language model in which every token decides, layer by layer, whether to be computed.

Inference only: routers decide greedily, each token from what is before it.  Keys and values are computed for every
token, so that the cache has no holes; queries, attention and MLP for executed tokens alone, in prefill and in
each step.

Shapes: B samples, T tokens of this call, L keys (cache included), H hidden, n query heads, G key-value heads,
m = n / G, D head width, R executed rows of the B * T flattened tokens, which go by sample, then by position.
"""

from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_megaroute import grow_in_place
from .configuration_megaroute import MegarouteConfig
from .routing_megaroute import MegarouteRouter
from .tokens_megaroute import EVERY, Rows, Sight

# Releases of transformers name the cache differently, in arguments and in outputs.
CACHE = "cache" if "cache" in {each.name for each in fields(CausalLMOutputWithPast)} else "past_key_values"


class MegarouteRMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., heads, D], entry i turned with entry i + D/2; cos and sin [..., D]."""
    first, second = x.chunk(2, -1)
    return x * cos[..., None, :] + torch.cat((-second, first), -1) * sin[..., None, :]


class MegarouteAttention(nn.Module):
    """Keys and values of every token, queries of executed ones."""

    def __init__(self, config: MegarouteConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        norm = (config.head_dim, config.rms_norm_eps)
        self.q_norm = MegarouteRMSNorm(*norm) if config.qk_norm else None
        self.k_norm = MegarouteRMSNorm(*norm) if config.qk_norm else None

    def keys_values(self, h_BTH: Tensor, sight: Sight, cache: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, L, D] of every token, those in the cache included, which is extended."""
        shape = (*h_BTH.shape[:2], self.kv_heads, self.head_dim)
        k = self.k_proj(h_BTH).view(shape)
        k = k if self.k_norm is None else self.k_norm(k)
        k = rotate(k, sight.cos_BTD, sight.sin_BTD).transpose(1, 2)
        v = self.v_proj(h_BTH).view(shape).transpose(1, 2)
        return (k, v) if cache is None else cache.update(k, v, self.layer)

    def forward(self, h_RH: Tensor, rows: Rows, keys_values: tuple[Tensor, Tensor], sight: Sight) -> Tensor:
        """[R, H], attention output of executed rows, `h_RH` their normed input."""
        q = self.q_proj(h_RH).view(h_RH.shape[0], -1, self.head_dim)
        q = q if self.q_norm is None else self.q_norm(q)
        q = rotate(q, rows.take(sight.cos_BTD), rows.take(sight.sin_BTD))
        k, v = keys_values
        if rows.counts_B is None:
            return self.o_proj(self._every(q, k, v, sight))
        return self.o_proj(self._chosen(q, k, v, rows, sight))

    def _every(self, q_RnD: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        batch, tokens = sight.positions_BT.shape
        if sight.plain(k.shape[2]) and tokens > 1:
            q = q_RnD.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads_per_group > 1)
            return out.transpose(1, 2).reshape(batch * tokens, -1)
        mask = None if sight.plain(k.shape[2]) else sight.mask(k.shape[2])
        return self._grouped(q_RnD.view(batch, tokens, -1, self.head_dim), k, v, mask)

    def _chosen(self, q_RnD: Tensor, k: Tensor, v: Tensor, rows: Rows, sight: Sight) -> Tensor:
        """Each sample by itself, so that its keys are a view of the cache."""
        assert rows.index_R is not None and rows.counts_B is not None
        tokens = sight.positions_BT.shape[1]
        if tokens == 1 and sight.plain(k.shape[2]):
            return self._one_of_each(q_RnD, k, v, rows.counts_B)
        index_R = rows.index_R % tokens
        found, at = [], 0
        for b, count in enumerate(rows.counts_B):
            if count:
                mine = slice(at, at + count)
                mask = sight.mask(k.shape[2])[b : b + 1, index_R[mine]]
                found.append(self._grouped(q_RnD[None, mine], k[b : b + 1], v[b : b + 1], mask))
                at += count
        return torch.cat(found)

    def _one_of_each(self, q_RnD: Tensor, k: Tensor, v: Tensor, counts_B: list[int]) -> Tensor:
        """[R, n * D].  One token of a sample sees all its keys; samples next to each other share a call."""
        q = q_RnD.view(-1, self.kv_heads, self.heads_per_group, self.head_dim)
        found, at, first = [], 0, 0
        for executed, run in groupby(counts_B):
            count = len(list(run))
            if executed:
                here = slice(first, first + count)
                found.append(F.scaled_dot_product_attention(q[at : at + count], k[here], v[here]))
                at += count
            first += count
        return torch.cat(found).view(q_RnD.shape[0], -1)

    def _grouped(self, q_BrnD: Tensor, k: Tensor, v: Tensor, mask_BrL: Tensor | None) -> Tensor:
        """[B * r, n * D].  The m queries that share a head become m times as many rows: no key is copied."""
        batch, rows, _, width = q_BrnD.shape
        m = self.heads_per_group
        q = q_BrnD.view(batch, rows, self.kv_heads, m, width).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch, self.kv_heads, m * rows, width)
        mask = None if mask_BrL is None else mask_BrL.repeat(1, m, 1)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.view(batch, self.kv_heads, m, rows, width).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * rows, -1)


class MegarouteMLP(nn.Module):
    """SwiGLU, gated GELU or plain GELU."""

    def __init__(self, config: MegarouteConfig) -> None:
        super().__init__()
        self.act = nn.SiLU() if config.hidden_act == "silu" else nn.GELU()
        sizes = (config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Linear(*sizes, bias=False) if config.mlp_gated else None
        self.up_proj = nn.Linear(*sizes, bias=False)
        self.down_proj = nn.Linear(*sizes[::-1], bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(h)))
        return self.down_proj(self.act(self.gate_proj(h)) * self.up_proj(h))


class MegarouteLayer(nn.Module):
    """A Transformer layer with a router in front of it, or of its branches, or with none."""

    def __init__(self, config: MegarouteConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = MegarouteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MegarouteAttention(config, layer)
        self.post_attention_layernorm = MegarouteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MegarouteMLP(config)
        parts = config.routed_parts if layer in config.routed_layers else ()
        self.routers = nn.ModuleDict({part: MegarouteRouter(config, layer, part) for part in parts})

    def forward(self, x: Tensor, sight: Sight, cache: Any) -> Tensor:
        """[B, T, H] -> [B, T, H]; decisions go into `sight`, keys and values into `cache`."""
        h = self.input_layernorm(x)
        keys_values = self.self_attn.keys_values(h, sight, cache)
        if "layer" in self.routers:
            return self._whole(x, h, keys_values, sight)
        rows = self._rows("attention", h, sight)
        if rows is not None:
            x = rows.add(x, self.self_attn(rows.take(h), rows, keys_values, sight))
        h = self.post_attention_layernorm(x)
        rows = self._rows("mlp", h, sight)
        return x if rows is None else rows.add(x, self.mlp(rows.take(h)))

    def _whole(self, x: Tensor, h: Tensor, keys_values: tuple[Tensor, Tensor], sight: Sight) -> Tensor:
        rows = self._rows("layer", h, sight)
        if rows is None:
            return x
        attended_RH = self.self_attn(rows.take(h), rows, keys_values, sight)
        x_RH = rows.take(x) + attended_RH
        return rows.add(x, attended_RH + self.mlp(self.post_attention_layernorm(x_RH)))

    def _rows(self, part: str, h_BTH: Tensor, sight: Sight) -> Rows | None:
        """The rows to compute; None when there is no row."""
        if part not in self.routers:
            return EVERY
        keep_BT, gate_BT = self.routers[part](h_BTH, sight.positions_BT, sight.decisions)
        if sight.present_BT is not None:
            keep_BT = keep_BT & sight.present_BT
        sight.decisions.append(keep_BT)
        counts_B = keep_BT.sum(1).tolist()
        if not any(counts_B):
            return None
        gate_N = None if gate_BT is None else gate_BT.flatten()
        if sum(counts_B) == keep_BT.numel():
            return Rows(None, None, gate_N)
        index_R = keep_BT.flatten().nonzero()[:, 0]
        return Rows(index_R, counts_B, None if gate_N is None else gate_N[index_R])


class MegaroutePreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config_class = MegarouteConfig
    base_model_prefix = "model"
    _no_split_modules = ("MegarouteLayer",)
    _keep_in_fp32_modules_strict = ("routers",)
    _supports_sdpa = True


@dataclass
class MegarouteModelOutput(BaseModelOutputWithPast):
    """Last hidden state, cache, and who was executed."""

    executed: tuple[Tensor, ...] | None = None
    """bool [B, T] of each routed unit, in the order in which a token meets them; False at padding."""


@dataclass
class MegarouteCausalLMOutput(CausalLMOutputWithPast):
    """Logits, loss, cache, and who was executed."""

    executed: tuple[Tensor, ...] | None = None
    """As in MegarouteModelOutput."""


class MegarouteModel(MegaroutePreTrainedModel):
    """The model without its output projection."""

    def __init__(self, config: MegarouteConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegarouteLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = MegarouteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> MegarouteModelOutput:
        """Hidden states [B, T, H]; `attention_mask` [B, L] is 0 at padding, or [B, 1, T, L] says who sees whom."""
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        grow_in_place(cache)
        assert input_ids is not None or inputs_embeds is not None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        sight = self._sight(x, input_ids, attention_mask, position_ids, cache)
        for layer in self.layers:
            x = layer(x, sight, cache)
        return MegarouteModelOutput(last_hidden_state=self.norm(x), executed=tuple(sight.decisions), **{CACHE: cache})

    def _sight(
        self, x: Tensor, ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> Sight:
        batch, tokens = x.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        present_BL = given_BTL = None
        if attention_mask is not None and attention_mask.dim() == 4:
            given_BTL = (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[:, 0]
        elif attention_mask is not None and not bool(attention_mask.all()):
            present_BL = attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=x.device)[None]
            if present_BL is not None:
                position_ids = (present_BL.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        positions_BT = position_ids.expand(batch, -1)
        starts_BT = None if self.config.attend_across_documents or ids is None else self._starts(ids, past, cache)
        return Sight(*self._angles(positions_BT, x.dtype), positions_BT, past, present_BL, starts_BT, given_BTL)

    def _angles(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = self.config.head_dim
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
        angles = positions_BT[..., None].float() * (1.0 / self.config.rope_theta**exponent)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _starts(self, ids: Tensor, past: int, cache: Any) -> Tensor:
        """First key of the document of each token.  The cache carries the last ends of documents from call to call."""
        places_T = torch.arange(past + 1, past + ids.shape[1] + 1, device=ids.device)
        after_BT = torch.where(ids == self.config.eos_token_id, places_T, 0)
        carried = getattr(cache, "document_starts", None)
        if past == 0 or carried is None:
            carried = torch.zeros_like(ids[:, 0])
        starts = torch.cat((carried[:, None], after_BT), 1).cummax(1).values
        if cache is not None:
            cache.document_starts = starts[:, -1]
        return starts[:, :-1]


class MegarouteForCausalLM(MegaroutePreTrainedModel, GenerationMixin):
    """The model with its output projection, and transformers' `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegarouteConfig) -> None:
        super().__init__(config)
        self.model = MegarouteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> MegarouteCausalLMOutput:
        """Logits [B, T, vocabulary], of the last `logits_to_keep` tokens only unless it is 0."""
        cache = past_key_values if cache is None else cache
        out = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MegarouteCausalLMOutput(loss=loss, logits=logits, executed=out.executed, **{CACHE: getattr(out, CACHE)})
