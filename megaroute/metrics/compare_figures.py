"""The figures of a comparison: every run in one colour, over tokens or over executed FLOPs."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megaroute.metrics import drawing
from megaroute.metrics.compare import Comparison
from megaroute.metrics.figures import Plot
from megaroute.metrics.formats import si
from megaroute.metrics.run_view import RunView
from megaroute.metrics.summary import final
from megaroute.metrics.trace import parse_label


def plots(comparison: Comparison) -> list[Plot]:
    """Every figure for which there is data, in the order of the page."""
    found = [
        _training_loss(comparison),
        _validation(comparison, over_flops=False),
        _validation(comparison, over_flops=True),
        _density(comparison),
        _density_over_time(comparison),
        _parts(comparison),
        _load(comparison),
    ]
    return [plot for plot in found if plot is not None]


def _colour(index: int) -> str:
    return drawing.RUNS[index % len(drawing.RUNS)]


def _over_tokens(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: si(tokens)))


def _curves(
    comparison: Comparison, values: Callable[[RunView], list[float]], name: str, dress: Callable[[Axes], None]
) -> str:
    """Running means of a value per training step, over tokens."""

    def draw(axes: Axes) -> None:
        for index, (run, label) in enumerate(zip(comparison.runs, comparison.names, strict=True)):
            if not run.history.train:
                continue
            _, y = drawing.series(run.history.train, values(run))
            tokens = np.array([r.tokens for r in run.history.train], dtype=float)
            axes.plot(*drawing.thin(tokens, drawing.smooth(y)), color=_colour(index), linewidth=1.6, label=label)
        _over_tokens(axes)
        dress(axes)

    return drawing.plain_figure(draw, name, columns=3)


def _training_loss(comparison: Comparison) -> Plot | None:
    if not any(run.history.train for run in comparison.runs):
        return None

    def dress(axes: Axes) -> None:
        axes.set_ylabel("nats per token")

    svg = _curves(comparison, lambda run: [r.loss for r in run.history.train], "compare-loss", dress)
    return Plot("Training loss", "Cross entropy of the next token, running mean; lower is better.", svg)


def _validation(comparison: Comparison, over_flops: bool) -> Plot | None:
    if not any(run.history.valid for run in comparison.runs):
        return None

    def draw(axes: Axes) -> None:
        for index, (run, label) in enumerate(zip(comparison.runs, comparison.names, strict=True)):
            place = _spent(run) if over_flops else {r.step: float(r.tokens) for r in run.history.train}
            points = [(place[r.step], r.bits_per_byte) for r in run.history.valid if r.step in place]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=_colour(index), marker="o", markersize=4, linewidth=1.4, label=label)
        axes.set_ylabel("bits per byte")
        _over_tokens(axes)
        if over_flops:
            axes.set_xlabel("executed FLOP")

    against = "executed FLOPs" if over_flops else "tokens"
    text = f"Cost of held-out text per byte against {against}, greedy routing; lower is better."
    name = f"compare-bits-{'flops' if over_flops else 'tokens'}"
    return Plot(f"Validation against {against}", text, drawing.plain_figure(draw, name, columns=3))


def _spent(run: RunView) -> dict[int, float]:
    """FLOPs executed up to each step."""
    sums = np.cumsum([r.executed_flops for r in run.history.train])
    return {r.step: float(total) for r, total in zip(run.history.train, sums, strict=True)}


def _density(comparison: Comparison) -> Plot | None:
    labels = sorted({label for run in comparison.runs for label in run.units}, key=parse_label)
    if not labels:
        return None
    places = {label: place for place, label in enumerate(labels)}

    def draw(axes: Axes) -> None:
        for index, (run, name) in enumerate(zip(comparison.runs, comparison.names, strict=True)):
            last = final(run.history.train)
            if not run.units or not last:
                continue
            means = np.mean([r.density for r in last], axis=0)
            x = [places[label] for label in run.units]
            axes.plot(x, means, color=_colour(index), marker="o", markersize=5, linewidth=1, label=name)
            targets = [np.nan if target is None else target for target in run.targets()]
            axes.plot(x, targets, color=_colour(index), marker="_", markersize=14, linestyle="none")
        every = -(-len(labels) // 12)
        by_branch = any(" " in label for label in labels)
        axes.set_xticks(
            range(0, len(labels), every),
            labels[::every],
            rotation=30 if by_branch else 0,
            ha="right" if by_branch else "center",
        )
        axes.set_xlabel("layer")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("tokens executed")

    text = "Share of tokens that each routed unit executes, mean of the last tenth of the steps. Bars: target."
    return Plot("Density per unit", text, drawing.plain_figure(draw, "compare-density", columns=3))


def _density_over_time(comparison: Comparison) -> Plot | None:
    routed = [
        (run, name)
        for run, name in zip(comparison.runs, comparison.names, strict=True)
        if run.units and run.history.train
    ]
    if not routed:
        return None

    def dress(axes: Axes) -> None:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("tokens executed")

    def values(run: RunView) -> list[float]:
        return [sum(r.density) / len(r.density) if r.density else float("nan") for r in run.history.train]

    svg = _curves(comparison, values, "compare-density-time", dress)
    return Plot("Density over time", "Mean over the routed units, running mean over steps.", svg)


def _parts(comparison: Comparison) -> Plot | None:
    recorded = [
        (run, name)
        for run, name in zip(comparison.runs, comparison.names, strict=True)
        if any(r.flops for r in run.history.train)
    ]
    if not recorded:
        return None

    def draw(axes: Axes) -> None:
        left = np.zeros(len(recorded))
        for part, (label, colour) in drawing.PARTS.items():
            widths = np.array([_per_token(run, part) for run, _ in recorded])
            if widths.any():
                axes.barh(range(len(recorded)), widths, left=left, color=colour, label=label, height=0.62)
            left += widths
        axes.set_yticks(range(len(recorded)), [name for _, name in recorded])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("FLOP per token, forward + backward")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: si(flops)))

    height = 1.6 + 0.32 * max(len(recorded), 4)
    svg = drawing.plain_figure(draw, "compare-parts", height=height)
    return Plot("Executed arithmetic by part", "Mean over the run. Thrown away: padding and masked pairs.", svg)


def _per_token(run: RunView, part: str) -> float:
    train = [r for r in run.history.train if r.flops]
    return sum(r.flops.get(part, 0.0) for r in train) / sum(r.step_tokens for r in train)


def _load(comparison: Comparison) -> Plot | None:
    if not any(r.load.get("ranks", 1.0) > 1.0 for run in comparison.runs for r in run.history.train):
        return None

    def dress(axes: Axes) -> None:
        axes.set_ylim(bottom=1.0)
        axes.set_ylabel("maximum over mean")

    def values(run: RunView) -> list[float]:
        return [r.load.get("ranks", float("nan")) for r in run.history.train]

    svg = _curves(comparison, values, "compare-load", dress)
    return Plot("Load of the ranks", "Rows of the busiest rank over the mean of all ranks: 1 is even.", svg)
