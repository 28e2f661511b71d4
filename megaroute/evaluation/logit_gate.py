"""Whether a converted model is the model it was converted from: the same logits, and the same greedy continuation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaroute.common.errors import CheckpointError
from megaroute.data.tokenizer import Tokenizer
from megaroute.evaluation.load import Loaded, load_run
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
    rows = gate_rows(source.tokenizer, text, source.config.data.sequence_length)
    return compare(
        read_checkpoint(source.checkpoint, rows), read_export(folder, rows, source.tokenizer.vocab_size), rows
    )


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
        "density": expected.density,
    }


@torch.no_grad()
def read_checkpoint(checkpoint: Path, rows: Tensor) -> Reading:
    """By the model that was trained, in float32: the full forward pass, also for each token of the continuation."""
    loaded = load_run(checkpoint)
    loaded.model.float()
    logits, density = _native(loaded, rows)
    ids = rows[:1, :PROMPT]
    for _ in range(CONTINUATION):
        last = _native(loaded, ids)[0][0, -1, : loaded.tokenizer.vocab_size]
        ids = torch.cat((ids, last.argmax().view(1, 1)), 1)
    return Reading(logits, _until(ids[0, min(PROMPT, rows.shape[1]) :].tolist(), loaded.tokenizer.eod), density)


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
def read_export(folder: Path, rows: Tensor, pieces: int) -> Reading:
    """By transformers, in float32, as a user loads it: the forward pass, and `generate` for the continuation."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    logits = torch.cat([model(row[None]).logits for row in rows])
    prompt = rows[:1, :PROMPT]
    out = model.generate(prompt, max_new_tokens=CONTINUATION, do_sample=False)
    assert int(out.max()) < pieces, "an id without a piece was generated"
    return Reading(logits, _until(out[0, prompt.shape[1] :].tolist(), model.config.eos_token_id), [])


def _until(ids: list[int], eod: int) -> list[int]:
    """Ids before the end of the document."""
    return ids[: ids.index(eod)] if eod in ids else ids
