"""From configuration to Megatron-core: the transformer config and which layer is what."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megaroute.config.root import Config
from megaroute.model.attention import CausalCoreAttention, RoutedAttentionSubmodules, RoutedSelfAttention
from megaroute.model.moe import expert_layer_spec
from megaroute.model.norm import RMSNorm
from megaroute.model.routed_layer import RoutedLayer
from megaroute.parallel.stages import Chunk

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's configuration for ours.  Fused kernels that need Transformer Engine or Apex stay off."""
    model, parallel, train = config.model, config.parallel, config.train
    dtype = DTYPES[train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.gated,
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are drawn in model/initialise.py, the same for every layout; Megatron-core still has to go through its
        # own initialisation, because there it marks which parameters are sharded over the tensor ranks.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        use_cpu_initialization=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        overlap_p2p_comm=parallel.overlap_p2p,
        batch_p2p_comm=parallel.batch_p2p,
        deallocate_pipeline_outputs=parallel.deallocate_pipeline_outputs,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        hetereogenous_dist_checkpoint=True,  # layers differ: only some have routers
        **RECOMPUTE[train.recompute],
    )


def block_spec(config: Config, chunk: Chunk) -> TransformerBlockSubmodules:
    """Layer specs of one chunk: routed where the configuration says so, Megatron-core's own layer elsewhere."""
    routed = set(config.routed_layers)
    specs = [_routed_layer(config) if layer in routed else _dense_layer(config) for layer in chunk.layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _mlp() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def _dense_layer(config: Config) -> ModuleSpec:
    norm = RMSNorm if config.model.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CausalCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _routed_layer(config: Config) -> ModuleSpec:
    if config.routing.router == "moe":
        return expert_layer_spec(config, _dense_layer(config))
    return ModuleSpec(
        module=RoutedLayer,
        params={"routing": config.routing},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=RoutedSelfAttention, submodules=RoutedAttentionSubmodules()),
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(),
        ),
    )
