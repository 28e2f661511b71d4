"""Which tokens a model spends its layers on: what it executed for every token of a text, and tables of that.

Shapes: N tokens of all documents, U routed units.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np

from megaroute.common.errors import DataError
from megaroute.config.units import Unit
from megaroute.data.documents import read_documents
from megaroute.data.formats import TextFile
from megaroute.evaluation.perplexity import scored_windows
from megaroute.evaluation.scoring import Scorer
from megaroute.evaluation.statistics import interval, ranks, ratio
from megaroute.evaluation.token_types import TYPES, TokenTypes

DECILES = 10
PLACES = 16
"""Parts of the context for which the table of positions has a row."""
FEWEST = 20
"""Tokens that a correlation, or the mean of a single token, needs."""


@dataclass(frozen=True)
class Atlas:
    """Every token of a text with what it executed; the last token of a document predicts nothing and is left out."""

    units: tuple[Unit, ...]
    num_layers: int
    context: int
    ids: np.ndarray
    """int64 [N]."""
    types: np.ndarray
    """int8 [N], numbers in TYPES."""
    positions: np.ndarray
    """int64 [N], place in the window, from 0."""
    nats: np.ndarray
    """float64 [N], cost of predicting the token after it."""
    executed: np.ndarray
    """bool [U, N]."""
    groups: np.ndarray
    """int64 [N], what is independent of the rest: the document, or the window where there is one document."""
    grouped_by: str
    """`documents` or `windows`."""

    @cached_property
    def layers(self) -> np.ndarray:
        """float64 [N], layers that each token executed, attention and MLP half a layer each."""
        weight = np.array([1.0 if unit.part == "layer" else 0.5 for unit in self.units])
        return self.num_layers - weight @ ~self.executed

    @cached_property
    def deciles(self) -> np.ndarray:
        """int64 [N], tenth of the text by the frequency of the token in it: 0 holds the most frequent tokens."""
        _, inverse, counts = np.unique(self.ids, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        middle = np.empty(len(counts))
        middle[order] = np.cumsum(counts[order]) - counts[order] / 2
        return (DECILES * middle / len(self.ids)).astype(np.int64)[inverse]

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [N], part of the context that the token is in, from 0."""
        return self.positions * min(PLACES, self.context) // self.context


def collect(
    scorer: Scorer, files: Sequence[TextFile], batch: int = 8, limit: int | None = None, text_field: str = "text"
) -> Atlas:
    """Run the model over the documents, the first `limit` of them, in windows of the whole context.

    Raises DataError when a file cannot be read or there is no text.
    """
    kinds = TokenTypes(scorer.tokenizer, scorer.config.model.vocab_size)
    columns: list[tuple[np.ndarray, ...]] = []
    documents = islice(read_documents(files, text_field=text_field), limit)
    for number, window, answer in scored_windows(scorer, documents, batch, scorer.context):
        last = slice(len(window.ids) - 1 - window.scored, len(window.ids) - 1)
        count = window.scored
        columns.append(
            (
                np.array(window.ids[last]),
                kinds.of(window.ids)[last],
                np.arange(last.start, last.stop),
                answer.nats[last],
                np.full(count, window.document),
                np.full(count, number),
                answer.executed[:, last].T,
            )
        )
    if not columns:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"{names}: no document has any text, so there is nothing to show; give other files")
    ids, types, positions, nats, document, window_number, executed = map(np.concatenate, zip(*columns, strict=True))
    several = len(np.unique(document)) > 1
    return Atlas(
        units=scorer.config.units,
        num_layers=scorer.config.model.num_layers,
        context=scorer.context,
        ids=ids,
        types=types,
        positions=positions,
        nats=nats,
        executed=executed.T,
        groups=document if several else window_number,
        grouped_by="documents" if several else "windows",
    )


Table = list[dict[str, Any]]


def by(atlas: Atlas, column: str, labels: np.ndarray, names: Sequence[str]) -> Table:
    """A row for each label that occurs: tokens, share of all, mean layers, mean cost, density of each unit."""
    table = []
    for label in np.unique(labels):
        chosen = labels == label
        table.append({column: names[label], **_means(atlas, chosen)})
    return table


def _means(atlas: Atlas, chosen: np.ndarray) -> dict[str, Any]:
    count = int(chosen.sum())
    densities = atlas.executed[:, chosen].mean(1) if atlas.units else []
    return {
        "tokens": count,
        "share": count / len(atlas.ids),
        "layers": float(atlas.layers[chosen].mean()),
        "nats": float(atlas.nats[chosen].mean()),
        **{f"layer {unit.label}": float(share) for unit, share in zip(atlas.units, densities, strict=True)},
    }


def tables(atlas: Atlas, pieces: Sequence[str]) -> dict[str, Table]:
    """All tables by name; `pieces` is the text of every id."""
    parts = min(PLACES, atlas.context)
    edges = [-(-part * atlas.context // parts) for part in range(parts + 1)]
    places = [f"{first}-{end - 1}" for first, end in pairwise(edges)]
    return {
        "types": by(atlas, "type", atlas.types, list(TYPES)),
        "frequency": by(atlas, "decile", atlas.deciles, [str(d + 1) for d in range(DECILES)]),
        "positions": by(atlas, "positions", atlas.places, places),
        "units": _units(atlas),
        "depth": _depth(atlas),
        "tokens": _tokens(atlas, pieces),
        "correlation": _correlations(atlas),
    }


def _units(atlas: Atlas) -> Table:
    """Of each routed unit: density, and mean cost after tokens that it executed and after those that it skipped."""
    table = []
    for unit, executed in zip(atlas.units, atlas.executed, strict=True):
        costs = [float(atlas.nats[chosen].mean()) if chosen.any() else None for chosen in (executed, ~executed)]
        row = {"unit": unit.label, "density": float(executed.mean())}
        table.append({**row, "nats_executed": costs[0], "nats_skipped": costs[1]})
    return table


def _depth(atlas: Atlas) -> Table:
    """Cost by the number of layers executed, with its standard error over the independent groups."""
    table = []
    for layers in np.unique(atlas.layers):
        chosen = atlas.layers == layers
        sums = np.bincount(atlas.groups[chosen], weights=atlas.nats[chosen])
        counts = np.bincount(atlas.groups[chosen])
        mean, error = ratio(sums[counts > 0], counts[counts > 0])
        table.append({"layers": float(layers), "tokens": int(chosen.sum()), "nats": mean, "stderr": error})
    return table


def _tokens(atlas: Atlas, pieces: Sequence[str]) -> Table:
    """Tokens that occur at least FEWEST times, from those that execute most to those that execute least."""
    found, inverse, counts = np.unique(atlas.ids, return_inverse=True, return_counts=True)
    layers = np.bincount(inverse, weights=atlas.layers) / counts
    nats = np.bincount(inverse, weights=atlas.nats) / counts
    order = [i for i in np.argsort(-layers, kind="stable") if counts[i] >= FEWEST]
    return [
        {
            "id": int(found[i]),
            "text": pieces[found[i]],
            "tokens": int(counts[i]),
            "layers": float(layers[i]),
            "nats": float(nats[i]),
        }
        for i in order
    ]


def _correlations(atlas: Atlas) -> Table:
    """Rank correlation of cost and executed layers, over all tokens and within each kind of token."""
    everything = np.ones(len(atlas.ids), dtype=bool)
    rows = [("all", everything)] + [(name, atlas.types == number) for number, name in enumerate(TYPES)]
    return [{"tokens": name, **correlation(atlas, chosen)} for name, chosen in rows if chosen.sum() >= FEWEST]


def correlation(atlas: Atlas, chosen: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation of the chosen tokens with a 95 % interval; None where the layers do not vary.

    The interval is a bootstrap over documents (or windows).  Ranks are those in the whole text: ranking each resample
    anew would take minutes and change the interval little.
    """
    x, y = ranks(atlas.layers[chosen]), ranks(atlas.nats[chosen])
    x, y = x - x.mean(), y - y.mean()
    _, group = np.unique(atlas.groups[chosen], return_inverse=True)
    sums = np.stack([np.bincount(group, weights=w) for w in (np.ones(len(x)), x, y, x * y, x * x, y * y)])

    def pearson(numbers: np.ndarray) -> float:
        n, sx, sy, sxy, sxx, syy = sums[:, numbers].sum(1)
        scale = (sxx - sx * sx / n) * (syy - sy * sy / n)
        return float((sxy - sx * sy / n) / math.sqrt(scale)) if scale > 1e-9 else math.nan

    count = sums.shape[1]
    value = pearson(np.arange(count))
    low, high = interval(pearson, count, seed=0) if count > 1 else (math.nan, math.nan)
    found = {"spearman": value, "low": low, "high": high}
    return {"count": int(chosen.sum())} | {k: None if math.isnan(v) else v for k, v in found.items()}
