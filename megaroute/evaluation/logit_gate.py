"""Whether a converted model is the model it was converted from: the same logits, and the same greedy continuation."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megaroute.common.errors import CheckpointError
from megaroute.data.tokenizer import Tokenizer
from megaroute.evaluation.load import Loaded, load_native
from megaroute.export.hf.modeling_megaroute import MegarouteForCausalLM
from megaroute.export.hf_folder import OURS, HFFolder
from megaroute.export.source import Source
from megaroute.export.tokenizer import check_same_ids
from megaroute.model.microbatch import micro_batch
from megaroute.routing.context import RoutingContext

TOLERANCE = 1e-4
ROWS, LENGTH, PROMPT, CONTINUATION = 4, 512, 48, 24
TEXT = Path(__file__).with_name("gate_text.txt")
"""Prose, code, figures and other scripts."""


@dataclass(frozen=True)
class Reading:
    """What a model makes of the gate's text."""

    logits: Tensor
    """float32 [rows, tokens, vocabulary], on the CPU."""
    continuation: list[int]
    """Greedy, of the beginning of the first row."""
    density: list[float]
    """Share of tokens that each routed unit executed."""


def gate_rows(tokenizer: Tokenizer, text: str, sequence_length: int) -> Tensor:
    """int64 [rows, tokens], text that starts like a document."""
    length = min(sequence_length, LENGTH)
    ids = tokenizer.encode(text)
    rows = [[tokenizer.eod, *ids[at : at + length - 1]] for at in range(0, len(ids), length - 1)]
    full = [row for row in rows[:ROWS] if len(row) == length] or [rows[0]]
    return torch.tensor(full)


def check_export(source: Source, folder: Path, text: str | None = None) -> dict[str, Any]:
    """Compare the model in `folder` with its source on `text`, TEXT when there is none; returns what was found.

    Raises UserError when they differ: nothing is exported that is not what was trained.
    """
    text = TEXT.read_text() if text is None else text
    check_same_ids(
        source.tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=True), text.splitlines(keepends=True)
    )
    rows, prompt = _rows(source, text)
    mine = read_checkpoint(source, rows, prompt)
    return compare(mine, read_export(folder, rows, prompt, source.tokenizer.vocab_size), rows)


def check_import(folder: HFFolder, source: Source, text: str | None = None) -> dict[str, Any]:
    """Compare the checkpoint `source`, which was made from `folder`, with what transformers computes from that.

    Returns what was found; raises UserError when they differ.
    """
    text = TEXT.read_text() if text is None else text
    rows, prompt = _rows(source, text)
    theirs = read_foreign(folder, rows, prompt, source.tokenizer)
    return compare(theirs, read_checkpoint(_exact(source), rows, prompt), rows)


def _rows(source: Source, text: str) -> tuple[Tensor, Tensor]:
    """Rows to read, and the beginning of one that leaves room for a continuation: beyond the longest row a model of
    another maker may see less than ours, in a sliding window."""
    longest = source.config.data.sequence_length
    rows = gate_rows(source.tokenizer, text, longest)
    return rows, rows[:1, : min(PROMPT, max(longest - CONTINUATION, 1))]


def _exact(source: Source) -> Source:
    """The same to be loaded in float32, from whatever precision it is stored in."""
    train = source.config.train.model_copy(update={"precision": "fp32"})
    return replace(source, config=source.config.model_copy(update={"train": train}))


def compare(expected: Reading, found: Reading, rows: Tensor) -> dict[str, Any]:
    """What there is to say of two readings of `rows`; raises CheckpointError when they are not those of one model."""
    difference = float((expected.logits - found.logits).abs().max())
    if not difference < TOLERANCE:
        raise CheckpointError(
            f"the converted model's logits differ from its source's by {difference:.2g}, and {TOLERANCE:g} is allowed, "
            "so it would not be the model that was trained; nothing was written"
        )
    if expected.continuation != found.continuation:
        raise CheckpointError(
            f"the converted model continues the check text with {found.continuation}, its source with "
            f"{expected.continuation}, so it would not be the model that was trained; nothing was written"
        )
    return {
        "max_difference": difference,
        "tokens": rows.numel(),
        "continuation": len(expected.continuation),
        "density": expected.density or found.density,
    }


@torch.no_grad()
def read_checkpoint(source: Source, rows: Tensor, prompt: Tensor) -> Reading:
    """By the model that was trained, in float32: the full forward pass, also for each token of the continuation."""
    loaded = load_native(source)
    loaded.model.float()
    logits, density = _native(loaded, rows)
    ids = prompt
    for _ in range(CONTINUATION):
        last = _native(loaded, ids)[0][0, -1, : loaded.tokenizer.vocab_size]
        ids = torch.cat((ids, last.argmax().view(1, 1)), 1)
    return Reading(logits, _until(ids[0, prompt.shape[1] :].tolist(), loaded.tokenizer.eod), density)


def _native(loaded: Loaded, rows: Tensor) -> tuple[Tensor, list[float]]:
    found, shares = [], []
    for row in rows:  # by itself, so that the text and not the batch sets the memory
        context = RoutingContext(seed=loaded.config.train.seed, step=loaded.step, samples_B=loaded.sample)
        packed = micro_batch(row.numel(), context, loaded.document_starts(row.tolist()))
        logits = loaded.model(row[None].to(loaded.platform.device), None, None, packed_seq_params=packed)
        found.append(logits[0].float().cpu())
        shares.append([float(context.records[unit.key].keep_SB.float().mean()) for unit in loaded.config.units])
    return torch.stack(found), torch.tensor(shares).mean(0).tolist()


@torch.no_grad()
def read_export(folder: Path, rows: Tensor, prompt: Tensor, pieces: int) -> Reading:
    """By transformers, in float32, as a user loads it: the forward pass, and `generate` for the continuation."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    logits = torch.cat([model(row[None]).logits for row in rows])
    out = model.generate(prompt, max_new_tokens=CONTINUATION, do_sample=False)
    assert int(out.max()) < pieces, "an id without a piece was generated"
    return Reading(logits, _until(out[0, prompt.shape[1] :].tolist(), model.config.eos_token_id), [])


@torch.no_grad()
def read_foreign(folder: HFFolder, rows: Tensor, prompt: Tensor, tokenizer: Tokenizer) -> Reading:
    """By transformers, in float32, whatever generation settings travel with the model: greedy, over known pieces."""
    kind = MegarouteForCausalLM if folder.kind == OURS else AutoModelForCausalLM  # no code from the folder
    model = kind.from_pretrained(folder.path, dtype=torch.float32, trust_remote_code=False).eval()
    logits = torch.cat([model(row[None]).logits for row in rows])
    eod = tokenizer.eod
    model.generation_config = GenerationConfig(
        max_new_tokens=CONTINUATION,
        do_sample=False,
        eos_token_id=eod,
        pad_token_id=eod,
        suppress_tokens=list(range(tokenizer.vocab_size, model.config.vocab_size)) or None,
    )
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    return Reading(logits, _until(out[0, prompt.shape[1] :].tolist(), eod), [])


def _until(ids: list[int], eod: int) -> list[int]:
    """Ids before the end of the document."""
    return ids[: ids.index(eod)] if eod in ids else ids
