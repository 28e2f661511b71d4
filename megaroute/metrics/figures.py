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
"""Densities are drawn as lines up to so many routed units, and as a heat map above."""


@dataclass(frozen=True)
class Plot:
    """One figure of the report."""

    title: str
    text: str
    """A sentence that says how to read it, or why there is nothing to see."""
    svg: str | None = None


def plots(run: RunView) -> list[Plot]:
    """Every figure, in the order of the page; one that has no data says so instead."""
    return [
        _loss(run),
        _bits_per_byte(run),
        *_tasks(run),
        _density(run),
        _flops(run),
        *_load(run),
        _speed(run),
        _optimizer(run),
    ]


def _loss(run: RunView) -> Plot:
    if not run.history.train:
        return Plot("Loss", "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        drawing.raw_and_smooth(axes, run.history.train, [r.loss for r in run.history.train])
        if run.history.valid:
            steps, losses = zip(*((r.step, r.loss) for r in run.history.valid), strict=True)
            axes.plot(steps, losses, color=drawing.ORANGE, marker="o", markersize=4, linewidth=1.2, label="validation")
        axes.set_ylabel("nats per token")

    text = f"Cross entropy of predicting the next token; lower is better. {drawing.how_drawn(run.history.train)}"
    if run.units and run.validates_greedily:
        text += " Validation routes greedily, training with noise."
    return Plot("Loss", text, drawing.figure(run, draw, "loss"))


def _bits_per_byte(run: RunView) -> Plot:
    title = "Validation, bits per byte"
    if not run.history.valid:
        return Plot(title, f"This run has not validated: {run.why_no_validation}.")

    def draw(axes: Axes) -> None:
        steps, scores = zip(*((r.step, r.bits_per_byte) for r in run.history.valid), strict=True)
        axes.plot(steps, scores, color=drawing.ORANGE, marker="o", markersize=4)
        rises = len(scores) > 1 and scores[-1] > scores[-2]  # the label goes where the curve does not
        offset = (0, 8 if rises else -16)
        axes.annotate(f"{scores[-1]:.3f}", (steps[-1], scores[-1]), offset, textcoords="offset points", ha="right")
        axes.margins(y=0.25)
        axes.set_ylabel("bits per byte")

    text = "Cost of held-out text per byte; lower is better, and models with other tokenizers can be compared."
    return Plot(title, text, drawing.figure(run, draw, "bits-per-byte"))


def _tasks(run: RunView) -> list[Plot]:
    records = run.history.tasks
    if not records:
        return []
    names = list(records[-1].scores)

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            scored = [(r.step, r.scores[name]) for r in records if name in r.scores]
            steps, values = [step for step, _ in scored], [100 * score.value for _, score in scored]
            errors = [100 * (score.stderr or 0.0) for _, score in scored]
            colour = drawing.RUNS[number % len(drawing.RUNS)]
            axes.errorbar(steps, values, errors, color=colour, marker="o", markersize=4, capsize=2, label=name)
        axes.set_ylabel("%")

    text = "Tasks scored while the run went on (section evaluate), with standard errors over their documents."
    return [Plot("Tasks", text, drawing.figure(run, draw, "tasks"))]


def _density(run: RunView) -> Plot:
    title = "Density per routed unit"
    if not run.units:
        return Plot("Density", "No layer of this run carries a router: every token executes every layer.")
    if not run.history.train:
        return Plot(title, "No step has been completed yet.")
    what = EXECUTED.get(run.router, "Share of tokens that each unit executes")
    if len(run.units) > MOST_LINES:
        if _targets_differ(run):
            what = "Share of tokens that each unit executes, less its target"
        text = f"{what}. White is on target, green above it, brown below."
        return Plot(title, text, drawing.figure(run, lambda axes: _heat_map(axes, run), "density"))
    text = f"{what}.{'' if len(run.history.train) < drawing.FEW else ' Running mean.'}"
    text += " Dots: validation." if run.history.valid else ""
    return Plot(title, text, drawing.figure(run, lambda axes: _density_lines(axes, run), "density"))


EXECUTED = {"moe": "Share of tokens that an expert of each unit computes; the others found no capacity"}
"""What density is of, where it is not the router's choice to execute."""


def _targets_differ(run: RunView) -> bool:
    """Whether no one density is the target of every unit and step."""
    targets = _target_curves(run)
    return bool(targets.shape[1] and targets.min() < targets.max())


def _density_lines(axes: Axes, run: RunView) -> None:
    # Units have an order, so their colours have one too.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(run.units)))
    for i, (unit, colour) in enumerate(zip(run.units, colours, strict=True)):
        x, y = drawing.series(run.history.train, [r.density[i] for r in run.history.train])
        axes.plot(*drawing.thin(x, drawing.smooth(y)), color=colour, linewidth=1.5, label=f"layer {unit}")
        validated = [(r.step, r.density[i]) for r in run.history.valid]
        if validated:
            axes.plot(*zip(*validated, strict=True), color=colour, marker="o", markersize=4, linestyle="none")
    for number, target in enumerate(sorted({tuple(curve) for curve in _target_curves(run).T})):
        steps = [r.step for r in run.history.train]
        axes.plot(
            *drawing.thin(np.array(steps), np.array(target)),
            color=drawing.INK,
            linestyle=(0, (5, 3)),
            linewidth=1,
            label="target" if number == 0 else None,
        )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("tokens executed")


def _target_curves(run: RunView) -> np.ndarray:
    """Targets over time, [steps, units]; no units when there are no targets."""
    targets = [run.targets(r.step) for r in run.history.train]
    return np.array([[t for t in at if t is not None] for at in targets], dtype=float)


def _heat_map(axes: Axes, run: RunView) -> None:
    steps = np.array([r.step for r in run.history.train])
    density = np.array([r.density for r in run.history.train])
    bins = np.array_split(np.arange(len(steps)), min(len(steps), 240))
    targets = _target_curves(run)
    # Targets that differ leave no one density to be white: their distance is shown instead.
    differ = _targets_differ(run)
    values = density - targets if differ else density
    cells = np.stack([values[part].mean(axis=0) for part in bins], axis=1)
    white = 0.0 if differ else min(max(float(targets.min()) if targets.size else 0.5, 0.05), 0.95)
    low, high = (-1.0, 1.0) if differ else (0.0, 1.0)
    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="none",
        cmap="BrBG",
        norm=TwoSlopeNorm(white, low, high),
        extent=(steps[0] - 0.5, steps[-1] + 0.5, len(run.units) - 0.5, -0.5),
    )
    every = -(-len(run.units) // 12)
    axes.set_yticks(range(0, len(run.units), every), [unit.replace("attention", "attn") for unit in run.units[::every]])
    axes.set_ylabel("layer")
    axes.grid(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, ticks=sorted({low, white, high}))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.axhline(white, color=drawing.INK, linewidth=1)
    bar.set_label("distance to target" if differ else "tokens executed")


def _flops(run: RunView) -> Plot:
    title, train = "Arithmetic per step", run.history.train
    if not train:
        return Plot(title, "No step has been completed yet.")

    def draw(axes: Axes) -> None:
        x, dense = drawing.series(train, [r.dense_flops for r in train])
        _, executed = drawing.series(train, [r.executed_flops for r in train])
        xs, low = drawing.thin(x, drawing.smooth(executed))
        if len(xs) == 1:  # an area needs a width
            xs, low = xs + np.array([-0.4, 0.4]), np.repeat(low, 2)
        high = np.interp(xs, x, dense)
        axes.plot(
            xs, high, color=drawing.MUTED, linestyle=(0, (5, 3)), linewidth=1.2, label="every token in every layer"
        )
        if all(r.flops for r in train):
            _stack_parts(axes, run, x, xs)
        else:
            axes.plot(xs, low, color=drawing.TEAL, linewidth=1.8, label="executed")
            axes.fill_between(xs, low, high, color=drawing.TEAL, alpha=0.10, linewidth=0)
        axes.set_ylim(0, 1.15 * float(np.nanmax([*high, *low])))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        axes.set_ylabel("FLOP, forward + backward")

    text = (
        "What was computed, counted from the tokens gathered, against the same model without routers. Thrown away: "
        "rows of padding, and query-key pairs behind a mask."
    )
    return Plot(title, text, drawing.figure(run, draw, "flops", columns=3))


def _stack_parts(axes: Axes, run: RunView, x: np.ndarray, xs: np.ndarray) -> None:
    train, below = run.history.train, np.zeros(len(xs))
    axes.set_axisbelow(True)
    for part, (name, colour) in drawing.PARTS.items():
        flops = np.array([r.flops.get(part, 0.0) for r in train])
        if flops.any():
            above = below + np.interp(xs, x, drawing.smooth(flops))
            axes.fill_between(xs, below, above, color=colour, linewidth=0, label=name)
            below = above


def _load(run: RunView) -> list[Plot]:
    """Imbalance and overflow, where there is any."""
    train = run.history.train
    uneven = any(r.load.get("ranks", 1.0) > 1.0 for r in train)
    overflow = any(sum(r.overflow) for r in train)
    plots = []
    if uneven:

        def draw_load(axes: Axes) -> None:
            drawing.raw_and_smooth(axes, train, [r.load.get("ranks", np.nan) for r in train])
            axes.set_ylim(bottom=1.0)
            axes.set_ylabel("maximum over mean")

        text = "Rows computed by the busiest rank over the mean of all, layers without a router included: 1 is even."
        plots.append(Plot("Load of the ranks", text, drawing.figure(run, draw_load, "load")))
    if overflow:

        def draw_overflow(axes: Axes) -> None:
            drawing.raw_and_smooth(axes, train, [r.overflow_share for r in train])
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
            axes.set_ylabel("found no capacity")

        text = "Share of what the routers wanted that found no capacity. " + drawing.how_drawn(train)
        plots.append(Plot("Overflow", text, drawing.figure(run, draw_overflow, "overflow")))
    return plots


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

    text = "Blue: norm of the gradient before clipping. Orange: learning rate. " + drawing.how_drawn(train)
    return Plot(title, text, drawing.figure(run, draw, "optimizer", legend=False))
