"""A small valid configuration file to vary."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megaroute.config.load import load_config
from megaroute.config.root import Config

SMALL = """
run: {name: small}
model: {num_layers: 8, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128, vocab_size: 256}
data: {train: t, valid: v, tokenizer: t.model, sequence_length: 32}
train: {steps: 10, global_batch: 8}
"""


@pytest.fixture
def small_file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def small(small_file) -> Callable[..., Config]:
    """`small("a.b=1", ...)`: the small configuration with overrides."""
    return lambda *overrides: load_config(small_file, overrides)
