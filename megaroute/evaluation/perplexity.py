"""Bits per byte of text files, with what each token cost in layers and FLOPs."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megaroute.common.errors import DataError
from megaroute.common.progress import Progress
from megaroute.config.root import Config
from megaroute.config.units import executed_layers
from megaroute.data.documents import read_documents
from megaroute.data.formats import SUFFIXES, Document, TextFile
from megaroute.evaluation.scoring import Scored, Scorer
from megaroute.evaluation.statistics import ratio
from megaroute.evaluation.windows import Window, windows
from megaroute.model.flops import UnitWork, dense_forward, executed_forward

AT_ONCE = 1024
"""Windows that are read, sorted by length and scored together."""
SUMS = ("document", "nats", "bytes", "tokens", "pairs")
"""Columns of a window; then for each routed unit the tokens that it executed, then the query-key pairs of these."""


def text_files(paths: Sequence[Path]) -> list[TextFile]:
    """The files to read.  Raises DataError for one that is not there, or of a kind that is not read."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is not a file, so there is no text to score; check the path")
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path} is not a {', '.join(SUFFIXES)} file, so its text cannot be found; convert it")
    return [TextFile(path, str(path)) for path in paths]


def bits_per_byte(
    scorer: Scorer,
    files: Sequence[TextFile],
    batch: int = 8,
    stride: int | None = None,
    limit: int | None = None,
    text_field: str = "text",
) -> dict[str, Any] | None:
    """Cost of the documents in `files`, the first `limit` of them; on rank 0 the result as JSON can hold it, else None.

    Each document starts from an end-of-document token and is scored to its own, as in training.  All ranks call it.

    Args:
        batch: rows of a forward pass; does not change the result.
        stride: tokens that a window after a document's first one scores, half the context unless given.

    Raises DataError when a file cannot be read or holds no text, and for a stride that is not 1 to the context.
    """
    stride = check_stride(scorer, stride)
    documents = islice(read_documents(files, text_field=text_field), limit)
    sums = gathered(scorer, _sums(scorer, documents, batch, stride))
    if not len(sums):
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"{names}: no document has any text, so there is nothing to score; give other files")
    if dist.get_rank():
        return None
    about = {
        "checkpoint": str(scorer.checkpoint),
        "step": scorer.step,
        "files": [str(file.path) for file in files],
        "layout": scorer.groups.dims.describe(),
        "precision": scorer.config.train.precision,
        "context": scorer.context,
        "stride": stride,
    }
    return about | summary(scorer.config, sums)


def check_stride(scorer: Scorer, stride: int | None) -> int:
    """The stride, half the context unless it is given."""
    if stride is None:
        return max(scorer.context // 2, 1)
    if stride > scorer.context:
        raise DataError(
            f"--stride {stride} is more than the model's context, {scorer.context} tokens (data.sequence_length), so "
            f"tokens would be left out; give at most {scorer.context}"
        )
    return stride


def document_ids(scorer: Scorer, document: Document) -> list[int]:
    """A document between the end-of-document token before it and its own."""
    eod = scorer.tokenizer.eod
    return [eod, *scorer.tokenizer.encode(document.text), eod]


def scored_windows(
    scorer: Scorer, documents: Iterable[Document], batch: int, stride: int
) -> Iterator[tuple[int, Window, Scored]]:
    """(number, window, answer) of this replica's share of the windows of all documents.  Tells its progress."""
    cut = (
        window
        for number, document in enumerate(documents)
        for window in windows(document_ids(scorer, document), scorer.context, stride, number)
    )
    mine = islice(enumerate(cut), scorer.replica, None, scorer.replicas)
    with Progress("reading and scoring", "window", shown=dist.get_rank() == 0) as progress:
        while chunk := list(islice(mine, AT_ONCE)):
            answers = scorer.score([window.ids for _, window in chunk], batch)
            progress.add(len(chunk))
            for (number, window), answer in zip(chunk, answers, strict=True):
                yield number, window, answer


def _sums(scorer: Scorer, documents: Iterable[Document], batch: int, stride: int) -> dict[int, np.ndarray]:
    token_bytes = scorer.tokenizer.token_bytes()
    return {
        number: _of_window(window, answer, token_bytes)
        for number, window, answer in scored_windows(scorer, documents, batch, stride)
    }


def _of_window(window: Window, answer: Scored, token_bytes: np.ndarray) -> np.ndarray:
    """float64 [len(SUMS) + 2 * U], sums over the scored tokens."""
    first = len(window.ids) - 1 - window.scored
    keys = np.arange(1, len(window.ids)) - answer.starts
    executed = answer.executed[:, first:]
    head = [
        window.document,
        answer.nats[first:].sum(),
        token_bytes[window.ids[1 + first :]].sum(),
        window.scored,
        keys[first:].sum(),
    ]
    return np.concatenate([head, executed.sum(1), (executed * keys[first:]).sum(1)])


def gathered(scorer: Scorer, mine: dict[int, np.ndarray]) -> np.ndarray:
    """Rows of all replicas in order of their numbers, so that sums over them do not depend on the number of ranks."""
    rows = {number: row for part in scorer.of_all_replicas(mine) for number, row in part.items()}
    return np.array([rows[number] for number in sorted(rows)])


def summary(config: Config, sums: np.ndarray) -> dict[str, Any]:
    """What the sums of windows [N, columns] add up to."""
    documents = len(np.unique(sums[:, 0]))
    over = "documents" if documents > 1 else "windows"
    units = _by_document(sums) if documents > 1 else sums
    column = dict(zip(SUMS, units.T, strict=False))
    bits, bits_error = ratio(column["nats"] / math.log(2), column["bytes"])
    nats, nats_error = ratio(column["nats"], column["tokens"])
    return {
        "documents": documents,
        "windows": len(sums),
        "tokens": int(column["tokens"].sum()),
        "bytes": int(column["bytes"].sum()),
        "bits_per_byte": bits,
        "bits_per_byte_stderr": bits_error,
        "nats_per_token": nats,
        "nats_per_token_stderr": nats_error,
        "perplexity": math.exp(nats),
        "stderr_over": over,
        **cost(config, sums.sum(0)),
    }


def _by_document(sums: np.ndarray) -> np.ndarray:
    _, index = np.unique(sums[:, 0], return_inverse=True)
    totals = np.zeros((index.max() + 1, sums.shape[1]))
    np.add.at(totals, index, sums)
    return totals


def cost(config: Config, total: np.ndarray) -> dict[str, Any]:
    """Layers and FLOPs per token, from the sums over all scored tokens, [len(SUMS) + 2 * U].

    FLOPs are those of the tokens that were kept and the keys that they see; padding of batches and windows is left out.
    """
    units, model, routing = config.units, config.model, config.routing
    tokens, pairs = int(total[SUMS.index("tokens")]), int(total[SUMS.index("pairs")])
    kept, seen = total[len(SUMS) :].reshape(2, len(units)).astype(int).tolist()
    experts = routing.moe.top_k if routing.router == "moe" else 1
    work = [
        UnitWork(unit, k, k * experts, *((0, 0) if unit.part == "mlp" else (p, p)))
        for unit, k, p in zip(units, kept, seen, strict=True)
    ]
    executed = executed_forward(model, routing, 1, tokens, work, (pairs, pairs))
    return {
        "layers_executed": executed_layers(model.num_layers, units, [k / tokens for k in kept]),
        "num_layers": model.num_layers,
        "density": {unit.label: k / tokens for unit, k in zip(units, kept, strict=True)},
        "flops_per_token": sum(executed.values()) / tokens,
        "dense_flops_per_token": dense_forward(model, 1, tokens, pairs) / tokens,
    }


def sentence(result: dict[str, Any]) -> str:
    """The result for a person, on one line."""
    error = result["bits_per_byte_stderr"]
    spread = f" ± {error:.4f}" if error is not None else ""
    share = result["flops_per_token"] / result["dense_flops_per_token"]
    return (
        f"{result['bits_per_byte']:.4f}{spread} bits per byte, perplexity {result['perplexity']:.2f} per token, over "
        f"{result['documents']:,} documents, {result['tokens']:,} tokens; each executed "
        f"{result['layers_executed']:.2f} of {result['num_layers']} layers, {share:.0%} of the FLOPs of a dense pass"
    )
