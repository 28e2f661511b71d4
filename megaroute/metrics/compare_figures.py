"""The figures of a comparison: every run in one colour, over tokens or over executed FLOPs."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megaroute.metrics import drawing
from megaroute.metrics.cautions import FAR, executed_in_validation
from megaroute.metrics.compare import Comparison
from megaroute.metrics.figures import Plot
from megaroute.metrics.formats import si
from megaroute.metrics.run_view import RunView
from megaroute.metrics.summary import density_of, final
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
        _overflow(comparison),
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
            _, y = drawing.series(run.history.train, values(run))
            if not np.isfinite(y).any():
                continue
            tokens = np.array([r.tokens for r in run.history.train], dtype=float)
            marker = "o" if np.isfinite(y).sum() == 1 else ""  # a line of one point is invisible
            curve = drawing.thin(tokens, drawing.smooth(y))
            axes.plot(*curve, color=_colour(index), linewidth=1.6, marker=marker, markersize=5, label=label)
        _over_tokens(axes)
        dress(axes)

    return drawing.plain_figure(draw, name, fewest=1, columns=3)


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
    text = f"Cost of held-out text per byte against {against}; lower is better."
    if over_flops and (more := _validates_with_more(comparison)):
        text += f" These are FLOPs of training; validation of {', '.join(more)} executes more than training did."
    name = f"compare-bits-{'flops' if over_flops else 'tokens'}"
    return Plot(f"Validation against {against}", text, drawing.plain_figure(draw, name, fewest=1, columns=3))


def _validates_with_more(comparison: Comparison) -> list[str]:
    """Runs whose training saves what their validation does not."""
    names = []
    for name, run in comparison.named.items():
        validation, training = executed_in_validation(run), density_of(final(run.history.train))
        if validation is not None and training is not None and validation > training + FAR:
            names.append(name)
    return names


def _spent(run: RunView) -> dict[int, float]:
    """FLOPs executed up to each step."""
    sums = np.cumsum([r.executed_flops for r in run.history.train])
    return {r.step: float(total) for r, total in zip(run.history.train, sums, strict=True)}


def _density(comparison: Comparison) -> Plot | None:
    drawn = {
        name: (run, _colour(index))
        for index, (name, run) in enumerate(comparison.named.items())
        if run.units and run.history.train
    }
    if not drawn:
        return None
    parts = {parse_label(label).part for run, _ in drawn.values() for label in run.units}
    shift = {"layer": 0.0, "attention": -0.2, "mlp": 0.2} if len(parts) > 1 else dict.fromkeys(parts, 0.0)

    def draw(axes: Axes) -> None:
        for name, (run, colour) in drawn.items():
            units = [parse_label(label) for label in run.units]
            x = [unit.layer + shift[unit.part] for unit in units]
            means = np.mean([r.density for r in final(run.history.train)], axis=0)
            axes.plot(x, means, color=colour, marker="o", markersize=5, linewidth=1, label=name)
            targets = [np.nan if target is None else target for target in run.targets()]
            axes.plot(x, targets, color=colour, marker="_", markersize=14, linestyle="none")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("layer" if len(parts) > 1 else f"{parts.copy().pop()} of layer".replace("layer of ", ""))
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("tokens executed")

    text = "Share of tokens that each routed unit executes, mean of the last tenth of the steps. Bars: target."
    if len(parts) > 1:
        text += " Attention stands left of its layer's number, the MLP right of it."
    return Plot("Density per unit", text, drawing.plain_figure(draw, "compare-density", fewest=1, columns=3))


def _density_over_time(comparison: Comparison) -> Plot | None:
    if not any(run.units and run.history.train for run in comparison.runs):
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


def _overflow(comparison: Comparison) -> Plot | None:
    if not any(sum(r.overflow) for run in comparison.runs for r in run.history.train):
        return None

    def dress(axes: Axes) -> None:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("found no capacity")

    def values(run: RunView) -> list[float]:
        limited = any(sum(r.overflow) for r in run.history.train)
        return [r.overflow_share if limited and r.overflow else float("nan") for r in run.history.train]

    svg = _curves(comparison, values, "compare-overflow", dress)
    return Plot("Overflow", "Share of what the routers wanted that found no capacity, running mean over steps.", svg)
