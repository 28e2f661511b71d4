"""The exported model of a checkpoint, in memory, without writing it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaroute.config.root import Config
from megaroute.export.architecture import OURS, check_exportable, model_settings
from megaroute.export.hf.configuration_megaroute import MegarouteConfig
from megaroute.export.hf.modeling_megaroute import MegarouteForCausalLM
from megaroute.export.naming import pieces
from megaroute.export.reader import CheckpointReader
from megaroute.export.source import Source


def load_model(source: Source, device: torch.device) -> Any:
    """The model with its weights as they are stored, ready for inference on `device`.

    Dense models are computed by the same code here, whatever class they are exported as.  Raises UserError when the
    model cannot be exported, or files of the checkpoint are not those that were written.
    """
    check_exportable(source.config)
    source.verify()
    settings = model_settings(
        source.config, OURS, source.record.step, source.tokenizer.vocab_size, source.tokenizer.eod
    )
    return assemble(source.config, settings, CheckpointReader(source.checkpoint).read, device)


def assemble(config: Config, settings: dict[str, Any], read: Callable[[str], Tensor], device: torch.device) -> Any:
    """The model of `settings` with weights that `read` gives by their names in a checkpoint."""
    with torch.device("meta"):
        model = MegarouteForCausalLM(MegarouteConfig(**settings))
    state: dict[str, Tensor] = {}
    for piece in pieces(config.model, config.routing):
        parts = piece.split(read(piece.source))
        state |= {name: part.to(device) for name, part in zip(piece.names, parts, strict=True)}
    if config.model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()
