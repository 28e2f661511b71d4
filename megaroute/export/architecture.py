"""Which transformers class a configuration is exported as, and with which configuration."""

from typing import Any

from megaroute.common.errors import ConfigError
from megaroute.config.root import Config

LLAMA, QWEN3, OURS = "LlamaForCausalLM", "Qwen3ForCausalLM", "MegarouteForCausalLM"
HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu", "gelu": "gelu"}
DENSE_AT_INFERENCE = ("dense", "random_ltd")
MULTIPLYING = ("highway", "mod")


def check_exportable(config: Config) -> None:
    """Raise ConfigError when there is no exported model that computes the same."""
    reason = why_not_exportable(config)
    if reason is not None:
        raise ConfigError(reason)


def why_not_exportable(config: Config) -> str | None:
    """One sentence, or None when the model can be exported."""
    routing = config.routing
    if routing.router == "moe":
        return (
            "routing.router moe: the exported model code has no experts; `megaroute generate` and `megaroute evaluate` "
            "run it from the checkpoint"
        )
    if routing.router == "mod" and not routing.mod.predictor:
        return (
            "routing.mod.predictor false: the top of a sequence depends on later tokens, which cached decoding does "
            "not have; train with routing.mod.predictor=true"
        )
    if routing.force is not None and config.routed_layers:
        return (
            f"routing.force {routing.force} overrules the routers for debugging, which an exported model does not; "
            "remove it from the run's config.yaml"
        )
    return None


def why_not_llama(config: Config) -> str | None:
    """Why a model needs code of its own, or None when the plain Llama class, or a relative of it, computes it."""
    if is_routed(config):
        return "its tokens skip layers"
    if not config.model.gated:
        return f"its MLP (model.activation {config.model.activation}) has no gate, and Llama's has"
    if not config.data.attend_across_documents:
        return "it was trained to attend within documents (data.attend_across_documents false)"
    if config.model.hidden_size % config.model.num_attention_heads:
        return "model.hidden_size is no multiple of model.num_attention_heads, which Llama wants"
    if config.model.qkv_bias:
        # AutoTokenizer takes Qwen2's own tokenizer for Qwen2ForCausalLM, whatever tokenizer_config.json says.
        return "it has biases of queries, keys and values (model.qkv_bias), and Llama has none"
    return None


def is_routed(config: Config) -> bool:
    """Whether tokens skip anything at inference."""
    return config.routing.router not in DENSE_AT_INFERENCE


def class_name(config: Config) -> str:
    """The transformers class."""
    if why_not_llama(config):
        return OURS
    return QWEN3 if config.model.qk_norm else LLAMA


def model_settings(config: Config, name: str, step: int, pieces: int, eod: int) -> dict[str, Any]:
    """Arguments of MegarouteConfig, or of LlamaConfig.

    Args:
        name: of the class.
        step: optimizer steps done, on which annealed values depend.
        pieces: ids that the tokenizer knows.
        eod: id of the end-of-document token, which also stands before each document.
    """
    model = config.model
    shape: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": HIDDEN_ACT[model.activation],
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
    }
    if name != OURS:
        return {**shape, "rope_parameters": {"rope_type": "default", "rope_theta": float(model.rope_base)}}
    ours = {
        "rope_theta": float(model.rope_base),
        "mlp_gated": model.gated,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        "attend_across_documents": config.data.attend_across_documents,
        "num_pieces": pieces,
    }
    return {**shape, **ours, **(_router_settings(config, step) if is_routed(config) else {})}


def _router_settings(config: Config, step: int) -> dict[str, Any]:
    routing = config.routing
    plain = routing.router in MULTIPLYING
    return {
        "router": routing.router,
        "router_unit": routing.unit,
        "routed_layers": list(config.routed_layers),
        "router_densities": list(routing.targets(config.model.num_layers, step)),
        "router_multiplies": plain or (routing.router != "random" and routing.gate == "probability"),
        "router_temperature": 1.0 if plain else routing.temperature_at(step),
        "router_seed": config.train.seed,
    }
