"""The report's figures: which curves there are, what they show, and what is said when there is no data."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megaroute.metrics import drawing
from megaroute.metrics.formats import si
from megaroute.metrics.run_view import RunView

MOST_LINES = 8
"""Densities are drawn as lines up to so many routed layers, and as a heat map above."""


@dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    title: str
    text: str
    """A sentence that says how to read it, or why there is nothing to see."""
    svg: str | None = None


def plots(run: RunView) -> list[Plot]:
    """Every figure, in the order of the page; one that has no data says so instead."""
    return [_loss(run), _bits_per_byte(run), _density(run), _flops(run), _speed(run), _optimizer(run)]


def _loss(run: RunView) -> Plot:
    if not run.history.train:
        return Plot("Loss", "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        drawing.raw_and_smooth(axes, run.history.train, [r.loss for r in run.history.train])
        if run.history.valid:
            steps, losses = zip(*((r.step, r.loss) for r in run.history.valid), strict=True)
            axes.plot(steps, losses, color=drawing.ORANGE, marker="o", markersize=4, linewidth=1.2, label="validation")
        axes.set_ylabel("nats per token")

    text = (
        "Cross entropy of predicting the next token; lower is better. Pale: every step. Strong: running mean. "
        "Validation routes greedily, training with noise."
    )
    return Plot("Loss", text, drawing.figure(run, draw, "loss"))


def _bits_per_byte(run: RunView) -> Plot:
    title = "Validation, bits per byte"
    if not run.history.valid:
        return Plot(
            title, "This run has not validated: it needs data.valid and train.validate_every, or its last step."
        )

    def draw(axes: Axes) -> None:
        steps, scores = zip(*((r.step, r.bits_per_byte) for r in run.history.valid), strict=True)
        axes.plot(steps, scores, color=drawing.ORANGE, marker="o", markersize=4)
        axes.annotate(f"{scores[-1]:.3f}", (steps[-1], scores[-1]), (0, 8), textcoords="offset points", ha="right")
        axes.margins(y=0.15)
        axes.set_ylabel("bits per byte")

    text = "Cost of held-out text per byte; lower is better, and models with other tokenizers can be compared."
    return Plot(title, text, drawing.figure(run, draw, "bits-per-byte"))


def _density(run: RunView) -> Plot:
    title = "Density per routed layer"
    if not run.layers:
        return Plot(title, "No layer of this run carries a router: every token executes every layer.")
    if not run.history.train:
        return Plot(title, "No step has been completed yet.")
    if len(run.layers) > MOST_LINES:
        text = "Share of tokens that each layer executes. White is on target, green above it, brown below."
        return Plot(title, text, drawing.figure(run, lambda axes: _heat_map(axes, run), "density"))
    text = (
        "Share of tokens that each layer executes (running mean). Dots: greedy routing at validation. Dashed: target."
    )
    return Plot(title, text, drawing.figure(run, lambda axes: _density_lines(axes, run), "density"))


def _density_lines(axes: Axes, run: RunView) -> None:
    # Layers have an order, so their colours have one too.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(run.layers)))
    for i, (layer, colour) in enumerate(zip(run.layers, colours, strict=True)):
        x, y = drawing.series(run.history.train, [r.density[i] for r in run.history.train])
        axes.plot(*drawing.thin(x, drawing.smooth(y)), color=colour, linewidth=1.5, label=f"layer {layer}")
        greedy = [(r.step, r.density[i]) for r in run.history.valid]
        if greedy:
            axes.plot(*zip(*greedy, strict=True), color=colour, marker="o", markersize=4, linestyle="none")
    if run.target is not None:
        axes.axhline(run.target, color=drawing.INK, linestyle=(0, (5, 3)), linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("tokens executed")


def _heat_map(axes: Axes, run: RunView) -> None:
    steps = np.array([r.step for r in run.history.train])
    density = np.array([r.density for r in run.history.train])
    bins = np.array_split(np.arange(len(steps)), min(len(steps), 240))
    cells = np.stack([density[part].mean(axis=0) for part in bins], axis=1)
    target = min(max(run.target if run.target is not None else 0.5, 0.05), 0.95)
    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="none",
        cmap="BrBG",
        norm=TwoSlopeNorm(target, 0, 1),
        extent=(steps[0] - 0.5, steps[-1] + 0.5, len(run.layers) - 0.5, -0.5),
    )
    every = -(-len(run.layers) // 12)
    axes.set_yticks(range(0, len(run.layers), every), [str(layer) for layer in run.layers[::every]])
    axes.set_ylabel("layer")
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, ticks=sorted({0.0, target, 1.0}))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.axhline(target, color=drawing.INK, linewidth=1)


def _flops(run: RunView) -> Plot:
    title, train = "Arithmetic per step", run.history.train
    if not train:
        return Plot(title, "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        x, dense = drawing.series(train, [r.dense_flops for r in train])
        _, executed = drawing.series(train, [r.executed_flops for r in train])
        xs, low = drawing.thin(x, drawing.smooth(executed))
        high = np.interp(xs, x, dense)
        axes.plot(
            xs, high, color=drawing.MUTED, linestyle=(0, (5, 3)), linewidth=1.2, label="every token in every layer"
        )
        axes.plot(xs, low, color=drawing.TEAL, linewidth=1.8, label="executed")
        axes.fill_between(xs, low, high, color=drawing.TEAL, alpha=0.10, linewidth=0)
        axes.set_ylim(0, 1.15 * float(np.nanmax([*high, *low])))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        axes.set_ylabel("FLOP, forward + backward")

    text = (
        "What was computed, counted from the tokens gathered, against the same model without skipping. Shaded: saved."
    )
    return Plot(title, text, drawing.figure(run, draw, "flops"))


def _speed(run: RunView) -> Plot:
    title, train = "Speed", run.history.train
    if not train:
        return Plot(title, "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        speeds = [r.tokens_per_second for r in train]
        drawing.raw_and_smooth(axes, train, speeds)
        axes.set_ylim(0, 1.15 * float(np.nanmax(speeds)) or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        axes.set_ylabel("tokens/s")

    text = "Tokens of a step over its wall time, all ranks together. The first steps of an attempt also warm up."
    return Plot(title, text, drawing.figure(run, draw, "speed"))


def _optimizer(run: RunView) -> Plot:
    title, train = "Gradient norm and learning rate", run.history.train
    if not train:
        return Plot(title, "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        drawing.raw_and_smooth(axes, train, [r.grad_norm for r in train])
        axes.set_ylabel("gradient norm", color=drawing.BLUE)
        axes.set_ylim(bottom=0)
        rates = axes.twinx()
        rates.plot(
            *drawing.thin(*drawing.series(train, [r.lr for r in train])),
            color=drawing.ORANGE,
            linewidth=1.2,
            label="learning rate",
        )
        rates.set_ylim(bottom=0)
        rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.1e}" if rate else "0"))
        rates.set_ylabel("learning rate", color=drawing.ORANGE)
        rates.grid(False)

    text = "Blue: norm of the gradient before clipping, pale for every step. Orange: learning rate."
    return Plot(title, text, drawing.figure(run, draw, "optimizer", legend=False))
