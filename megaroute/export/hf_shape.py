"""What a Hugging Face configuration says, in the keys of ours; or which of its keys our model has nothing for."""

from collections.abc import Iterator
from typing import Any

from megaroute.config.model import ModelConfig
from megaroute.export.architecture import HIDDEN_ACT
from megaroute.export.hf_folder import OURS, SETTINGS, HFFolder, ModelError

KINDS = ("llama", "mistral", "qwen2", "qwen3", OURS)
"""model_type of what can be imported."""
GATED = {HIDDEN_ACT[name]: name for name in ("swiglu", "geglu")}
IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old releases of transformers saved and that follow from the configuration."""


def model_section(folder: HFFolder) -> dict[str, Any]:
    """The `model` section.  Raises ModelError, naming the key, for what our model cannot compute."""
    settings = folder.settings
    for key, value, why in _obstacles(folder):
        raise ModelError(f"{key} {value!r} in {folder.path / SETTINGS} cannot be imported: {why}")
    gated = settings.get("mlp_gated", True)
    return {
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": settings["hidden_size"],
        "num_attention_heads": settings["num_attention_heads"],
        "num_kv_heads": settings["num_key_value_heads"],
        "head_dim": settings.get("head_dim"),
        "ffn_hidden_size": settings["intermediate_size"],
        "activation": GATED[settings["hidden_act"]] if gated else "gelu",
        "qkv_bias": folder.kind == "qwen2" or settings.get("qkv_bias", False),
        "qk_norm": folder.kind == "qwen3" or settings.get("qk_norm", False),
        "vocab_size": settings["vocab_size"],
        "tie_embeddings": bool(settings["tie_word_embeddings"]),
        "rope_base": int(_rope(settings)["rope_theta"]),
        "norm_eps": settings["rms_norm_eps"],
    }


def longest_row(folder: HFFolder) -> int:
    """Tokens of a row for which our attention, which sees the whole row, is the source's."""
    longest, window = int(folder.settings["max_position_embeddings"]), folder.settings.get("sliding_window")
    if window is None or not folder.settings.get("use_sliding_window", True):
        return longest
    return min(longest, int(window))


def check_tensors(folder: HFFolder, wanted: set[str], model: ModelConfig) -> None:
    """Raise ModelError unless the folder has the tensors in `wanted`, of the model's shapes, and no other weights."""
    found = {name for name in folder.tensors if not name.endswith(IGNORED)}
    if model.tie_embeddings:
        found.discard("lm_head.weight")  # some writers save it twice
    if missing := sorted(wanted - found):
        raise ModelError(f"{folder.path} lacks the weights {missing[0]} (and {len(missing) - 1} more); copy it again")
    if extra := sorted(found - wanted):
        raise ModelError(
            f"{folder.path} has weights {extra[0]} (and {len(extra) - 1} more) that a model of model_type "
            f"{folder.kind!r} as {SETTINGS} describes it does not have, so it computes something else and is not "
            "imported"
        )
    for name in sorted(wanted):
        shape, expected = folder.tensors[name].shape, _shape(name, model)
        if shape != expected:
            raise ModelError(
                f"{name} in {folder.tensors[name].file} has shape {shape}, and by {SETTINGS} it would be {expected}; "
                "copy the model again"
            )


def _obstacles(folder: HFFolder) -> Iterator[tuple[str, Any, str]]:
    """(key, value, why) of what has no counterpart here."""
    settings, rope = folder.settings, _rope(folder.settings)
    if settings.get("quantization_config") is not None:
        yield "quantization_config", settings["quantization_config"], "weights are plain numbers here; dequantise them"
    if settings["hidden_act"] not in GATED:
        yield "hidden_act", settings["hidden_act"], f"the MLP has {' or '.join(GATED)}"
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            yield key, settings[key], "these linear maps have no bias here"
    if rope.get("rope_type", "default") != "default":
        key = "rope_scaling" if folder.raw.get("rope_scaling") else "rope_parameters"
        yield key, rope["rope_type"], "rotary frequencies are not scaled here"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", rope["partial_rotary_factor"], "positions turn all channels of a head here"
    if rope["rope_theta"] != int(rope["rope_theta"]):
        yield "rope_theta", rope["rope_theta"], "model.rope_base is a whole number"


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = settings.get("rope_parameters") or {}
    return {"rope_theta": settings.get("rope_theta", 10000.0), **found}


def _shape(name: str, model: ModelConfig) -> tuple[int, ...]:
    hidden, width = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    shapes = {
        "embed_tokens": (model.vocab_size, hidden),
        "lm_head": (model.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    *_, owner, kind = name.split(".")
    if owner in ("q_norm", "k_norm"):
        return (model.head_size,)
    if ".routers." in name:
        return {"weight": (2, hidden), "predictor": (1, hidden), "bias": ()}[kind]
    shape = shapes.get(owner, (hidden,))
    return shape[:1] if kind == "bias" else shape
