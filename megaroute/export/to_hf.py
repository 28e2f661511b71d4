"""From a checkpoint to a folder that transformers loads."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from megaroute.data.tokenizer import Tokenizer
from megaroute.export import card, hf
from megaroute.export.architecture import (
    LLAMA,
    OURS,
    QWEN3,
    check_exportable,
    class_name,
    model_settings,
    why_not_llama,
)
from megaroute.export.destination import appearing, check_destination
from megaroute.export.hf.configuration_megaroute import MegarouteConfig
from megaroute.export.naming import Piece, pieces
from megaroute.export.reader import CheckpointReader
from megaroute.export.safetensors_writer import Entry, write_shards
from megaroute.export.source import Source, open_source
from megaroute.export.tokenizer import fast_tokenizer, save_tokenizer

CODE = tuple(f"{part}_megaroute.py" for part in ("cache", "configuration", "modeling", "routing", "tokens"))
PLAIN = {LLAMA: "llama", QWEN3: "qwen3"}
"""model_type of classes that transformers has."""
AUTO_MAP = {
    "AutoConfig": "configuration_megaroute.MegarouteConfig",
    "AutoModel": "modeling_megaroute.MegarouteModel",
    "AutoModelForCausalLM": "modeling_megaroute.MegarouteForCausalLM",
}

Check = Callable[[Source, Path], dict[str, Any]]
"""Compares what was written with its source and says what it found; raises UserError when they differ."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    class_name: str
    why_not_llama: str | None
    bytes: int
    """Of the weights."""
    found: dict[str, Any] = field(default_factory=dict)
    """What the check found; empty without one."""


def to_hf(checkpoint: Path, out: Path, shard_bytes: int, check: Check | None) -> Exported:
    """Write the model of a checkpoint, of any layout, to the folder `out`, which appears only when `check` is content.

    No more than the largest tensor is in memory at a time, before the check.  Raises UserError for a checkpoint that
    cannot be exported and a destination that cannot be written, before anything is written.
    """
    source = open_source(checkpoint)
    config = source.config
    check_exportable(config)
    source.verify()
    reader = CheckpointReader(source.checkpoint)
    wanted = list(pieces(config.model, config.routing))
    entries = [entry for piece in wanted for entry in _entries(piece, reader)]
    size = sum(entry.bytes for entry in entries)
    check_destination(out, size)
    tokenizer = fast_tokenizer(source.tokenizer, config.data.sequence_length)
    with appearing(out) as folder:
        write_shards(folder, entries, _tensors(wanted, reader), shard_bytes)
        _write_settings(folder, source, reader.dtype(wanted[0].source))
        save_tokenizer(source.tokenizer, tokenizer, folder)
        exported = Exported(class_name(config), why_not_llama(config), size, check(source, folder) if check else {})
        (folder / "README.md").write_text(card.text(source, exported.class_name, exported.found))
    return exported


def _entries(piece: Piece, reader: CheckpointReader) -> Iterator[Entry]:
    shapes = piece.shapes(reader.shape(piece.source))
    return (Entry(name, shape, reader.dtype(piece.source)) for name, shape in zip(piece.names, shapes, strict=True))


def _tensors(wanted: list[Piece], reader: CheckpointReader) -> Iterator[Tensor]:
    for piece in wanted:
        yield from piece.split(reader.read(piece.source))


def _write_settings(folder: Path, source: Source, dtype: torch.dtype) -> None:
    name, tokenizer = class_name(source.config), source.tokenizer
    settings = model_settings(source.config, name, source.record.step, tokenizer.vocab_size, tokenizer.eod)
    settings |= {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}
    if name in PLAIN:
        AutoConfig.for_model(PLAIN[name], **settings).save_pretrained(folder)
    else:
        assert name == OURS
        MegarouteConfig(**settings, auto_map=AUTO_MAP).save_pretrained(folder)
        for file in CODE:
            shutil.copyfile(Path(next(iter(hf.__path__))) / file, folder / file)
    _generation(tokenizer, source.config.model.vocab_size).save_pretrained(folder)


def _generation(tokenizer: Tokenizer, rows: int) -> GenerationConfig:
    """Ids that no piece has are never generated."""
    beyond = list(range(tokenizer.vocab_size, rows)) or None
    eod = tokenizer.eod
    return GenerationConfig(bos_token_id=eod, eos_token_id=eod, pad_token_id=eod, suppress_tokens=beyond)
