"""Layers by tokens as a compact SVG: bands of tokens, in each a row per layer and a column per token."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from megaroute.metrics.trace import Passage, Trace

EXECUTED, ALWAYS, SKIPPED = "#1d8a99", "#9aa5b1", "#edf0f3"
"""Colours of a cell: executed by a routed layer, by a layer without a router, and skipped."""

MOST_PER_BAND = 128
"""Tokens in one band; more would be too narrow to point at."""

_WIDTH, _LABELS, _SHARES = 1090, 30, 42
_WIDEST_CELL, _HIGHEST_CELL, _LOWEST_CELL, _BAND_HEIGHT = 22.0, 14.0, 5.0, 240.0
_SPACE_ABOVE, _TEXT_HEIGHT = 12.0, 10.0


def grid(trace: Trace, passage: Passage, titles: Sequence[str]) -> str:
    """SVG of one passage; `titles` are what the pointer shows, one per token, [T].  Empty for a passage of no token."""
    total = len(passage.tokens)
    if not total:
        return ""
    per_band = min(total, MOST_PER_BAND)
    cell = min((_WIDTH - _LABELS - _SHARES) / per_band, _WIDEST_CELL)
    row = min(max(_BAND_HEIGHT / trace.num_layers, _LOWEST_CELL), _HIGHEST_CELL)
    step = trace.num_layers * row + _SPACE_ABOVE
    starts = range(0, total, per_band)
    bands = [
        f'<g transform="translate({_LABELS} {_SPACE_ABOVE + step * i:.1f})">'
        f"{_band(_rows(trace, passage, start, start + per_band), titles[start : start + per_band], cell, row)}</g>"
        for i, start in enumerate(starts)
    ]
    width, height = _LABELS + cell * per_band + _SHARES, step * len(starts) + _SPACE_ABOVE
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="Layers by tokens">{"".join(bands)}</svg>'
    )


Row = tuple[bool, Sequence[bool]]
"""Of one layer: whether it has a router, and which of the band's tokens it executed."""


def _rows(trace: Trace, passage: Passage, start: int, stop: int) -> list[Row]:
    routed = dict(zip(trace.routed_layers, passage.keep, strict=True))
    always = [True] * len(passage.tokens)
    return [(layer in routed, routed.get(layer, always)[start:stop]) for layer in range(trace.num_layers)]


def _band(rows: Sequence[Row], titles: Sequence[str], cell: float, row: float) -> str:
    width, height = cell * len(titles), row * len(rows)
    parts = [f'<path fill="{SKIPPED}" d="{_box(0, 0, width, height)}"/>']
    for routed, fill in ((True, EXECUTED), (False, ALWAYS)):
        layers = [(number, kept) for number, (has_router, kept) in enumerate(rows) if has_router == routed]
        path = "".join(_runs(kept, number * row, cell, row) for number, kept in layers)
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
    """Layer on the left and share executed on the right, of every row that has room for it."""
    every = max(1, -int(-_TEXT_HEIGHT // row))
    texts = []
    for number, (_, kept) in list(enumerate(rows))[::every]:
        y = (number + 0.5) * row
        texts.append(f'<text x="-5" y="{y:.1f}" class="end">L{number}</text>')
        texts.append(f'<text x="{width + 5:.1f}" y="{y:.1f}">{100 * sum(kept) / len(kept):.0f} %</text>')
    return "".join(texts)


def _columns(titles: Sequence[str], cell: float, height: float) -> str:
    """Transparent columns that the pointer finds, each with its title."""
    columns = (
        f'<rect x="{cell * i:.1f}" width="{cell:.1f}" height="{height:.0f}"><title>{escape(title)}</title></rect>'
        for i, title in enumerate(titles)
    )
    return f'<g class="columns">{"".join(columns)}</g>'
