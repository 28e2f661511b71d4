"""Drawing for the report: one style, curves thinned and smoothed, figures as SVG that may share a page."""

import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megaroute.metrics.formats import si
from megaroute.metrics.records import TrainRecord
from megaroute.metrics.run_view import RunView

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, PALE_BLUE, ORANGE, TEAL = "#1d5f99", "#a9c9e6", "#c8551b", "#1a7f72"
RUNS = (BLUE, ORANGE, TEAL, "#8b3f8f", "#b8860b", "#5b6770", "#c2416c", "#3f7d20")
"""Colours of runs that share a figure, in order."""
PARTS = {
    "key_value": ("keys and values", "#9bb8d3"),
    "query_output": ("queries and output", "#4f86b4"),
    "attention": ("attention", "#1d5f99"),
    "mlp": ("MLP", "#1a7f72"),
    "head": ("output matrix", "#a7adb4"),
    "router": ("routers", "#8b3f8f"),
    "padding": ("thrown away", "#c8551b"),
}
"""Name and colour of each part of the executed FLOPs, in the order in which they are stacked."""

MOST_POINTS = 1200
"""Points of one curve; more would only make the page heavy."""

FEW = 80
"""Under so many steps the running mean is of one step, and no other curve."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def figure(run: RunView, draw: Callable[[Axes], None], name: str, legend: bool = True, columns: int = 4) -> str:
    """SVG of what `draw` puts on axes whose x is the step, resumed attempts marked.  `name` is unique on the page."""

    def over_steps(axes: Axes) -> None:
        draw(axes)
        _step_axis(axes, run)
        _mark_attempts(axes, run)

    return plain_figure(over_steps, name, 2 if legend else sys.maxsize, columns)


def plain_figure(
    draw: Callable[[Axes], None], name: str, fewest: int = 2, columns: int = 4, height: float = 3.1
) -> str:
    """SVG of what `draw` puts on axes, with a legend in `columns` when at least `fewest` things have names."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Figure(figsize=(6.4, height), layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(handles) >= fewest:
            canvas.legend(handles, labels, loc="outside upper right", ncols=columns, fontsize=9, handlelength=1.4)
        return _svg(canvas, name)


def _step_axis(axes: Axes, run: RunView) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: si(step) if step >= 1e6 else f"{step:,.0f}"))
    if len(run.history.train) == 1:
        # A line of one point is invisible, and an axis without length has the same tick five times.
        axes.set_xlim(run.steps_done - 1, run.steps_done + 1)
        for line in (line for part in axes.figure.axes for line in part.get_lines()):
            line.set_marker("o" if np.size(line.get_xdata()) == 1 else "")


def _mark_attempts(axes: Axes, run: RunView) -> None:
    starts = {number: steps[0].step for number in run.history.attempts[1:] if (steps := run.history.of_attempt(number))}
    for number, step in starts.items():
        axes.axvline(step - 0.5, color=MUTED, linestyle=(0, (1, 2)), linewidth=1)
        axes.annotate(
            f"attempt {number}" if len(starts) <= 3 else f"{number}",
            (step - 0.5, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(2, 1),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
            ha="left" if step < 0.8 * run.steps_done else "right",
        )


def raw_and_smooth(axes: Axes, train: Sequence[TrainRecord], values: Sequence[float]) -> None:
    """Every step as a pale thin line, and their running mean as a strong one; of few steps the former alone, strong."""
    x, y = series(train, values)
    if len(x) < FEW:
        axes.plot(x, y, color=BLUE, linewidth=1.8, label="every step")
        return
    axes.plot(*thin(x, y), color=PALE_BLUE, linewidth=0.8, label="every step")
    axes.plot(*thin(x, smooth(y)), color=BLUE, linewidth=1.8, label="running mean")


def how_drawn(train: Sequence[TrainRecord]) -> str:
    """What raw_and_smooth draws, for the caption."""
    return "Every step." if len(train) < FEW else "Pale: every step. Strong: running mean."


def series(train: Sequence[TrainRecord], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values as arrays, [N] each; what is not finite becomes NaN, which leaves a gap in a curve."""
    y = np.array(values, dtype=float)
    return np.array([r.step for r in train], dtype=float), np.where(np.isfinite(y), y, np.nan)


def smooth(y: np.ndarray) -> np.ndarray:
    """Mean of a window of a fortieth of the points around each one; what is not finite is left out."""
    half = len(y) // FEW
    known = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points that keep the extremes, so that a spike stays visible."""
    if len(x) <= MOST_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), MOST_POINTS // 2 - 1):
        known = part[np.isfinite(y[part])]
        if len(known):
            kept |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
    order = sorted(kept)
    return x[order], y[order]


def _svg(canvas: Figure, name: str) -> str:
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Several figures share one page, where an id may stand only once.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
