"""`report.html`: one self-contained page that shows a run to a person."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaroute.common.files import atomic_write
from megaroute.metrics import figures, formats, grid, passages, summary
from megaroute.metrics.run_view import RunView

FILE_NAME = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, and return its path.

    What the directory lacks is named on the page.  Raises DataError when it has no metrics.jsonl.
    """
    run = RunView.open(run_dir)
    path = run.directory / FILE_NAME
    # A token may be half of a surrogate pair, which UTF-8 has no form for.
    atomic_write(path, render(run).encode("utf-8", "replace"))
    return path


def render(run: RunView) -> str:
    """The page as HTML.  It needs no network and no other file; the same run gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("megaroute.metrics"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = formats.duration
    trace = run.trace
    views = [passages.view(trace, passage) for passage in trace.passages] if trace else []
    return environment.get_template("report.html.j2").render(
        run=run,
        state=summary.state(run),
        shape=summary.shape(run),
        results=summary.results(run),
        attempts=summary.attempts(run),
        alarms=summary.alarms(run),
        plots=[(plot, Markup(plot.svg or "")) for plot in figures.plots(run)],
        trace=trace,
        colours=passages.colours(trace) if trace else {},
        legend=passages.legend(trace) if trace else [],
        passages=[(view, Markup(view.grid)) for view in views],
        ink=passages.INK,
        cell={"executed": grid.EXECUTED, "skipped": grid.SKIPPED, "always": grid.ALWAYS},
    )
