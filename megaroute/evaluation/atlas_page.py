"""The token atlas as one HTML page and CSV files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from megaroute.common.files import atomic_write
from megaroute.evaluation.atlas import Atlas, Table
from megaroute.evaluation.token_types import TYPES
from megaroute.metrics import drawing
from megaroute.metrics.figures import Plot
from megaroute.metrics.formats import percent
from megaroute.metrics.report import environment, write_page

PAGE = "atlas.html"
SHOWN = 15
"""Tokens of each end that the page lists."""


def write(atlas: Atlas, tables: dict[str, Table], about: dict[str, Any], folder: Path) -> Path:
    """Write the page and a CSV file for each table into `folder`, and return the page's path.

    Raises UserError when the page cannot be written.
    """
    page = write_page(folder / PAGE, render(atlas, tables, about))
    for name, table in tables.items():
        if table:
            atomic_write(folder / f"{name}.csv", as_csv(table).encode("utf-8", "replace"))
    return page


def as_csv(table: Table) -> str:
    """A table as CSV with a header; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def render(atlas: Atlas, tables: dict[str, Table], about: dict[str, Any]) -> str:
    """The page as HTML; it needs no network and no other file."""
    plots = [*_bars(atlas, tables), *_lines(atlas, tables), _depth(tables["depth"])]
    tokens = tables["tokens"]
    return (
        environment()
        .get_template("atlas.html.j2")
        .render(
            about=about,
            atlas=atlas,
            layers=float(atlas.layers.mean()),
            nats=float(atlas.nats.mean()),
            kinds=TYPES,
            types=tables["types"],
            correlations=tables["correlation"],
            units=tables["units"],
            most=tokens[:SHOWN],
            least=tokens[::-1][:SHOWN],
            plots=[(plot, Markup(plot.svg or "")) for plot in plots],
            percent=percent,
        )
    )


def _bars(atlas: Atlas, tables: dict[str, Table]) -> list[Plot]:
    table = sorted(tables["types"], key=lambda row: row["layers"])

    def layers(axes: Axes) -> None:
        names = [f"{row['type']} ({percent(row['share'])})" for row in table]
        axes.barh(names, [row["layers"] for row in table], color=drawing.BLUE, height=0.65)
        axes.axvline(float(atlas.layers.mean()), color=drawing.INK, linestyle=(0, (5, 3)), linewidth=1)
        axes.set_xlim(0, atlas.num_layers)
        axes.set_xlabel("layers executed")
        axes.grid(axis="y", visible=False)

    def heat(axes: Axes) -> None:
        labels = [f"layer {unit.label}" for unit in atlas.units]
        cells = np.array([[row[label] for label in labels] for row in table[::-1]])
        image = axes.imshow(cells, aspect="auto", cmap="BrBG", vmin=0, vmax=1, interpolation="none")
        axes.set_yticks(range(len(table)), [row["type"] for row in table[::-1]])
        every = -(-len(labels) // 12)
        axes.set_xticks(range(0, len(labels), every), [unit.label for unit in atlas.units[::every]])
        axes.set_xlabel("routed unit")
        axes.grid(False)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, ticks=[0, 0.5, 1])
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    text = "Mean layers that tokens of each kind execute; in brackets their share of the text, dashed the mean of all."
    plots = [Plot("Layers by kind of token", text, drawing.plain_figure(layers, "types"))]
    if atlas.units:
        text = "Share of the tokens of each kind that each unit executes."
        plots.append(Plot("Units by kind of token", text, drawing.plain_figure(heat, "types-units")))
    return plots


def _lines(atlas: Atlas, tables: dict[str, Table]) -> list[Plot]:
    def line(rows: Table, label: str, marks: Sequence[str], name: str) -> str:
        def draw(axes: Axes) -> None:
            axes.plot(range(len(rows)), [row["layers"] for row in rows], color=drawing.BLUE, marker="o", markersize=4)
            every = -(-len(rows) // 10)
            axes.set_xticks(range(0, len(rows), every), marks[::every])
            axes.set_xlabel(label)
            axes.set_ylabel("layers executed")
            axes.margins(y=0.25)

        return drawing.plain_figure(draw, name)

    frequency, positions = tables["frequency"], tables["positions"]
    deciles = line(frequency, "tenth of the text, rarest last", [row["decile"] for row in frequency], "frequency")
    starts = [row["positions"].partition("-")[0] for row in positions]
    text = (
        "Tokens sorted by how often they occur in this text, in tenths of the text; a frequent token may fill several."
    )
    plots = [
        Plot("Layers by frequency", text, deciles),
        Plot(
            "Layers by position",
            f"Place in a window of {atlas.context:,} tokens; a document starts at 0.",
            line(positions, "position", starts, "positions"),
        ),
    ]
    if atlas.units:
        plots.append(Plot("Units", "Share of all tokens that each unit executes.", _densities(tables["units"])))
    return plots


def _densities(units: Table) -> str:
    def draw(axes: Axes) -> None:
        axes.bar([row["unit"] for row in units], [row["density"] for row in units], color=drawing.TEAL, width=0.65)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("routed unit")
        axes.set_ylabel("tokens executed")
        axes.grid(axis="x", visible=False)
        if len(units) > 12:
            axes.set_xticks(range(0, len(units), -(-len(units) // 12)))

    return drawing.plain_figure(draw, "units")


def _depth(depth: Table) -> Plot:
    def draw(axes: Axes) -> None:
        x, y = [row["layers"] for row in depth], [row["nats"] for row in depth]
        error = [1.96 * (row["stderr"] or 0.0) for row in depth]
        axes.errorbar(x, y, error, color=drawing.ORANGE, marker="o", markersize=4, linewidth=1.2, capsize=2)
        axes.set_xlabel("layers that the token executed")
        axes.set_ylabel("nats, next token")

    text = "Mean cost of predicting the next token, by the layers executed for it; bars are 95 % intervals."
    return Plot("Cost against executed depth", text, drawing.plain_figure(draw, "depth"))
