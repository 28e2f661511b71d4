"""Layers by tokens as a compact SVG: bands of tokens, in each a column per token and a row per layer or branch."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from megaroute.config.units import Part, Unit
from megaroute.metrics.trace import Passage, Trace

EXECUTED, ALWAYS, SKIPPED = "#1d8a99", "#9aa5b1", "#edf0f3"
"""Colours of a cell: executed behind a router, without a router, and skipped."""

MOST_PER_BAND = 128
"""Tokens in one band; more would be too narrow to point at."""

_WIDTH, _SHARES = 1090, 42
_LABELS, _BRANCH_LABELS = 30, 86
_WIDEST_CELL, _HIGHEST_CELL, _LOWEST_CELL, _BAND_HEIGHT = 22.0, 14.0, 5.0, 240.0
_SPACE_ABOVE, _TEXT_HEIGHT = 12.0, 10.0


def grid(trace: Trace, passage: Passage, titles: Sequence[str]) -> str:
    """SVG of one passage; `titles` are what the pointer shows, one per token, [T].  Empty for a passage of no token."""
    total = len(passage.tokens)
    if not total:
        return ""
    rows, per_band = _rows(trace, passage), min(total, MOST_PER_BAND)
    labels = _BRANCH_LABELS if trace.by_branch else _LABELS
    cell = min((_WIDTH - labels - _SHARES) / per_band, _WIDEST_CELL)
    row = min(max(_BAND_HEIGHT / len(rows), _LOWEST_CELL), _HIGHEST_CELL)
    step = len(rows) * row + _SPACE_ABOVE
    starts = range(0, total, per_band)
    bands = [
        f'<g transform="translate({labels} {_SPACE_ABOVE + step * i:.1f})">'
        f"{_band(_cut(rows, start, start + per_band), titles[start : start + per_band], cell, row)}</g>"
        for i, start in enumerate(starts)
    ]
    width, height = labels + cell * per_band + _SHARES, step * len(starts) + _SPACE_ABOVE
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="Layers by tokens">{"".join(bands)}</svg>'
    )


class Row(NamedTuple):
    """One layer or branch."""

    label: str
    routed: bool
    kept: Sequence[bool]
    """Which tokens executed it."""


def _rows(trace: Trace, passage: Passage) -> list[Row]:
    routed = dict(zip(trace.units, passage.keep, strict=True))
    branched = {unit.layer for unit in trace.units if unit.part != "layer"}
    always = [True] * len(passage.tokens)
    rows = []
    for layer in range(trace.num_layers):
        parts: tuple[Part, ...] = ("attention", "mlp") if layer in branched else ("layer",)
        units = [Unit(layer, part) for part in parts]
        rows += [Row(f"L{unit.label}", unit in routed, routed.get(unit, always)) for unit in units]
    return rows


def _cut(rows: Sequence[Row], start: int, stop: int) -> list[Row]:
    return [row._replace(kept=row.kept[start:stop]) for row in rows]


def _band(rows: Sequence[Row], titles: Sequence[str], cell: float, row: float) -> str:
    width, height = cell * len(titles), row * len(rows)
    parts = [f'<path fill="{SKIPPED}" d="{_box(0, 0, width, height)}"/>']
    for routed, fill in ((True, EXECUTED), (False, ALWAYS)):
        marked = [(number, each.kept) for number, each in enumerate(rows) if each.routed == routed]
        path = "".join(_runs(kept, number * row, cell, row) for number, kept in marked)
        parts += [f'<path fill="{fill}" d="{path}"/>'] if path else []
    lines = [f"M0 {row * i:.1f}h{width:.1f}" for i in range(1, len(rows))]
    lines += [f"M{cell * i:.2f} 0v{height:.1f}" for i in range(1, len(titles))]
    parts.append(f'<path class="lines" d="{"".join(lines)}"/>')
    return "".join(parts) + _labels(rows, width, row) + _columns(titles, cell, height)


def _runs(kept: Sequence[bool], y: float, cell: float, row: float) -> str:
    """One subpath per run of executed tokens."""
    boxes, start = [], 0
    for executed, run in groupby(kept):
        length = len(list(run))
        if executed:
            boxes.append(_box(start * cell, y, length * cell, row))
        start += length
    return "".join(boxes)


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.2f} {y:.1f}h{width:.2f}v{height:.1f}h-{width:.2f}z"


def _labels(rows: Sequence[Row], width: float, row: float) -> str:
    """Name on the left and share executed on the right, of every row that has room for it."""
    every = max(1, -int(-_TEXT_HEIGHT // row))
    texts = []
    for number, (label, _, kept) in list(enumerate(rows))[::every]:
        y = (number + 0.5) * row
        texts.append(f'<text x="-5" y="{y:.1f}" class="end">{label}</text>')
        texts.append(f'<text x="{width + 5:.1f}" y="{y:.1f}">{100 * sum(kept) / len(kept):.0f} %</text>')
    return "".join(texts)


def _columns(titles: Sequence[str], cell: float, height: float) -> str:
    """Transparent columns that the pointer finds, each with its title."""
    columns = (
        f'<rect x="{cell * i:.1f}" width="{cell:.1f}" height="{height:.0f}"><title>{escape(title)}</title></rect>'
        for i, title in enumerate(titles)
    )
    return f'<g class="columns">{"".join(columns)}</g>'
