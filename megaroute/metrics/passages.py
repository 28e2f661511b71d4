"""The routing picture: every token of a passage coloured by how much it executed, and the grid below it."""

import json
from dataclasses import dataclass

from megaroute.metrics.formats import percent, unit_name
from megaroute.metrics.grid import grid
from megaroute.metrics.trace import Passage, Trace

INK = "#14202b"
"""Colour of text; its contrast with every colour of the scale is at least 7 to 1 (WCAG 2.1, level AAA)."""
SCALE = ("#fff0b8", "#cbe8a0", "#87d2b6", "#69b9e4")
"""Few layers to many.  Lightness falls all the way, so the order also shows in grey and to the colour-blind."""


@dataclass(frozen=True)
class TokenView:
    """One token as the page shows it; not escaped."""

    text: str
    """Its text, control characters made visible."""
    title: str
    """What the pointer shows."""
    executed: int
    """Layers, or branches of layers, that it executed, those without a router included."""
    ends_line: bool


@dataclass(frozen=True)
class PassageView:
    """One passage as the page shows it."""

    heading: str
    tokens: tuple[TokenView, ...]
    grid: str
    """SVG, escaped."""


def view(trace: Trace, passage: Passage) -> PassageView:
    """The picture of one passage of a trace."""
    tokens = tuple(_token(trace, passage, i) for i in range(len(passage.tokens)))
    return PassageView(_heading(trace, passage), tokens, grid(trace, passage, [token.title for token in tokens]))


def colours(trace: Trace) -> dict[int, str]:
    """The colour of each number of layers or branches that a token can execute, from fewest to most."""
    routed = len(trace.units)
    always = trace.total - routed
    return {always + i: _colour(i / routed if routed else 1.0) for i in range(routed + 1)}


def legend(trace: Trace) -> list[int]:
    """Numbers for the legend, from fewest to most; of many about ten."""
    counts = list(colours(trace))
    every = -(-len(counts) // 10)
    return counts[::-1][::every][::-1]


def _heading(trace: Trace, passage: Passage) -> str:
    decisions = [kept for row in passage.keep for kept in row]
    known = [loss for loss in passage.loss if loss is not None]
    parts = [f"{len(passage.tokens):,} tokens"]
    if decisions:
        parts.append(f"routed {trace.counted} executed {percent(sum(decisions) / len(decisions))} of them")
    if known:
        parts.append(f"mean cost of the next token {sum(known) / len(known):.2f} nats")
    return ", ".join(parts)


def _token(trace: Trace, passage: Passage, i: int) -> TokenView:
    text, loss = passage.tokens[i], passage.loss[i]
    skipped = [unit_name(unit.label) for unit, row in zip(trace.units, passage.keep, strict=True) if not row[i]]
    executed = trace.total - len(skipped)
    title = f"{json.dumps(text, ensure_ascii=False)}: {executed} of {trace.total} {trace.counted}"
    if skipped:
        title += f", skipped {', '.join(skipped)}"
    if loss is not None:
        title += f"; predicting the next token cost {loss:.2f} nats"
    return TokenView(_visible(text), title, executed, text.endswith("\n"))


def _visible(text: str) -> str:
    """Line feeds as a sign, other control characters as escapes, nothing at all as a dot."""
    shown = (c if c.isprintable() or ord(c) > 0xFF else c.encode("unicode_escape").decode() for c in text)
    return "".join("\u23ce" if c == "\\n" else c for c in shown) or "\u00b7"


def _colour(share: float) -> str:
    place = share * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    channels = zip(_rgb(SCALE[low]), _rgb(SCALE[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in channels)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
