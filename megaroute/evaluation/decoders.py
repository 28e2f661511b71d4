"""The next token's logits: by cached decoding, or by a full forward pass over the whole context."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megaroute.common.errors import CheckpointError
from megaroute.common.log import get_logger
from megaroute.config.units import Unit, executed_layers
from megaroute.data.tokenizer import Tokenizer
from megaroute.evaluation.load import Loaded, load_native
from megaroute.export.architecture import LLAMA, OURS, QWEN3, why_not_exportable
from megaroute.export.source import open_source
from megaroute.model.microbatch import micro_batch
from megaroute.platform import device
from megaroute.routing.context import RoutingContext

EXPORT_SETTINGS = "config.json"

log = get_logger(__name__)


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a key-value cache, and of that of a dense model with the same cost per token."""

    tokens: int
    bytes: int
    layers: int
    effective_layers: float
    """Layers that a token executes when densities are at their targets; so many has the dense model."""

    @property
    def effective_bytes(self) -> int:
        """Bytes in a dense model of `effective_layers`."""
        return round(self.bytes * self.effective_layers / self.layers)


class Decoder(Protocol):
    """A model and its tokenizer, asked for one token after another."""

    tokenizer: Tokenizer
    num_layers: int
    length: int
    """Longest context."""

    def next(self, text: list[int]) -> tuple[Tensor, float]:
        """Logits after `text`, float32 [vocabulary] on the CPU, and the layers that its last token executed.

        `text` is what it was in the last call and more; of one longer than `length` only the end is read.
        """
        ...

    def cache_size(self) -> CacheSize | None:
        """What is cached now; None where nothing is."""
        ...


class PlainDecoder:
    """The model that was trained, one pass over the whole context per token."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.num_layers, self.length = loaded.config.model.num_layers, loaded.config.data.sequence_length

    @torch.no_grad()
    def next(self, text: list[int]) -> tuple[Tensor, float]:
        loaded, context = self.loaded, text[-self.length :]
        routing = RoutingContext(seed=loaded.config.train.seed, step=loaded.step, samples_B=loaded.sample)
        packed = micro_batch(len(context), routing, loaded.document_starts(context))
        tokens = torch.tensor([context], device=loaded.platform.device)
        logits_BSV = loaded.model(tokens, None, None, packed_seq_params=packed)
        units = loaded.config.units
        shares = [float(routing.records[unit.key].keep_SB[-1, 0]) for unit in units]
        return logits_BSV[0, -1].float().cpu(), executed_layers(self.num_layers, units, shares)

    def cache_size(self) -> None:
        return None


class CachedDecoder:
    """A served model: each token passes once, and only through what it executes.

    Where the context is full, its first quarter is dropped and the rest is read again.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.num_layers, self.length = model.config.num_hidden_layers, model.config.max_position_embeddings
        self._cache: Any = None
        self._first = self._seen = 0

    @torch.no_grad()
    def next(self, text: list[int]) -> tuple[Tensor, float]:
        if len(text) - self._first > self.length:
            kept = self.length if self._cache is None else max(3 * self.length // 4, 1)
            self._first = self._seen = len(text) - kept
            self._cache = None
        tokens = torch.tensor([text[self._seen :]], device=self.model.device)
        out = self.model(tokens, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._seen = out.cache, len(text)
        shares = [float(keep_BT[0, -1]) for keep_BT in getattr(out, "executed", ())]
        return out.logits[0, -1].float().cpu(), executed_layers(self.num_layers, self._units, shares)

    def cache_size(self) -> CacheSize:
        config, tokens = self.model.config, self._seen - self._first
        width = config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        effective = executed_layers(self.num_layers, self._units, getattr(config, "router_densities", []))
        return CacheSize(tokens, 2 * self.num_layers * width * tokens, self.num_layers, effective)

    @property
    def _units(self) -> list[Unit]:
        config = self.model.config
        return [Unit(layer, part) for layer in getattr(config, "routed_layers", []) for part in config.routed_parts]


def open_decoder(path: Path) -> Decoder:
    """Of a run directory, one of its checkpoints, or an exported model.

    Checkpoints are decoded with a cache too, unless their router cannot be or transformers is not installed.  Raises
    UserError when there is nothing that can be loaded.
    """
    if (path / EXPORT_SETTINGS).is_file():
        return _open_export(path)
    source = open_source(path)
    reason = why_not_exportable(source.config)
    if importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed: pip install 'megaroute[export]'"
    if reason is not None:
        log.warning("without a cache, one pass over the whole context per token (%s)", reason)
        return PlainDecoder(load_native(source))
    from megaroute.export.in_memory import load_model

    return CachedDecoder(load_model(source, device.resolve(source.config.run.device).device), source.tokenizer)


def _open_export(path: Path) -> Decoder:
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(f"{path} is an exported model, which needs transformers: pip install 'megaroute[export]'")
    import transformers
    from transformers.utils.logging import disable_progress_bar

    from megaroute.export.hf.modeling_megaroute import MegarouteForCausalLM

    named = json.loads((path / EXPORT_SETTINGS).read_text()).get("architectures") or [None]
    classes = {OURS: MegarouteForCausalLM, **{name: getattr(transformers, name) for name in (LLAMA, QWEN3)}}
    if named[0] not in classes:
        raise CheckpointError(f"{path} holds a {named[0]}, and only {', '.join(classes)} are known here")
    disable_progress_bar()
    tokenizer = Tokenizer(path / "tokenizer.model", key=str(path))
    model = classes[named[0]].from_pretrained(path, dtype="auto", local_files_only=True)
    return CachedDecoder(model.to(device.resolve("auto").device).eval(), tokenizer)
