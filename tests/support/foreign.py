"""Small models of other makers, as transformers saves them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def save_foreign(
    folder: Path,
    tokenizer: Path | None,
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **settings: Any,
) -> Path:
    """A model of random weights, none of them 0 or 1, in `folder`, with a sentencepiece model beside it."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **{**SHAPE, "head_dim": 8, **settings})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder
