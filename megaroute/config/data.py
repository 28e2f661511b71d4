"""`data`: shards, tokenizer, packing."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from megaroute.config.section import Section


class DataConfig(Section):
    """Where the text comes from and how it becomes rows.  Relative paths start at the working directory."""

    train: Path
    """Folder of training shards with its manifest.json (tools/make_shards.py writes both)."""
    valid: Path | None = None
    """Folder of validation shards; no validation when not given."""
    tokenizer: Path
    """Sentencepiece model (tools/train_tokenizer.py)."""
    sequence_length: PositiveInt = 1024
    """Tokens S of a row that the model sees; a row takes S + 1 tokens of text, so that each position has its target."""
    attend_across_documents: bool = True
    """Whether a token may attend to the documents before its own in the same row."""
    lanes: PositiveInt = 64
    """Virtual lanes V of the stream.  A multiple of every data-parallel size the run will ever use; fixed for a run."""
    seed: NonNegativeInt = 0
    """Seed of the order of documents."""
    verify: Literal["full", "size"] = "full"
    """Before a run: `full` compares every shard's sha256 with the manifest, `size` only its bytes."""
