"""`report.html`: one self-contained page that shows a run to a person; and a page for several runs side by side."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaroute.common.errors import UserError
from megaroute.common.files import atomic_write
from megaroute.metrics import (
    alarms,
    cautions,
    compare,
    compare_figures,
    drawing,
    experts,
    figures,
    formats,
    grid,
    passages,
    routing_text,
    routing_view,
    summary,
)
from megaroute.metrics.compare import Comparison
from megaroute.metrics.run_view import RunView

FILE_NAME = "report.html"
COMPARISON_NAME = "comparison.html"

MOST_ALARMS = 12
"""Alarms that the page lists."""


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, `report.html` in its directory unless `out` names a file, and return its path.

    What the directory lacks is named on the page.  Raises DataError when it has no metrics.jsonl, and
    UserError when the file cannot be written.
    """
    run = RunView.open(run_dir)
    return write_page(Path(out) if out is not None else run.directory / FILE_NAME, render(run))


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one page about several runs, `comparison.html` beside the first unless `out` names a file.

    Differences are to the first run that has validated.  Returns the path.  Raises DataError when a directory has no
    metrics.jsonl, and UserError when one is named twice or the file cannot be written.
    """
    _check_apart(run_dirs)
    comparison = Comparison.of([RunView.open(run_dir) for run_dir in run_dirs])
    beside = comparison.runs[0].directory.resolve().parent / COMPARISON_NAME
    return write_page(Path(out) if out is not None else beside, render_comparison(comparison))


def _check_apart(run_dirs: Sequence[str | Path]) -> None:
    seen: set[Path] = set()
    for run_dir in run_dirs:
        at = Path(run_dir).resolve()
        if (place := at.parent if at.is_file() else at) in seen:
            raise UserError(f"{run_dir} is named twice, but a run does not differ from itself; name each run once")
        seen.add(place)


def write_page(path: Path, page: str) -> Path:
    """Write a page and return its path.  Raises UserError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A token may be half of a surrogate pair, which UTF-8 has no form for.
        atomic_write(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}), so there is no report; name another file with --out"
        ) from error
    return path


def environment() -> Environment:
    """Where the templates of all pages are."""
    environment = Environment(
        loader=PackageLoader("megaroute.metrics"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = formats.duration
    return environment


def render(run: RunView) -> str:
    """The page as HTML.  It needs no network and no other file; the same run gives the same bytes."""
    trace = run.trace
    views = [passages.view(trace, passage) for passage in trace.passages] if trace else []
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            state=summary.state(run),
            shape=summary.shape(run),
            results=summary.results(run),
            attempts=summary.attempts(run),
            alarms=alarms.alarms(run.history),
            most_alarms=MOST_ALARMS,
            about=routing_text.about(run),
            skips=run.skips or not run.history.train,
            units=routing_view.units(run),
            experts=experts.experts(run),
            arithmetic=routing_view.arithmetic(run),
            load=routing_view.load(run),
            plots=[(plot, Markup(plot.svg or "")) for plot in figures.plots(run)],
            trace=trace,
            colours=passages.colours(trace) if trace else {},
            legend=passages.legend(trace) if trace else [],
            passages=[(view, Markup(view.grid)) for view in views],
            ink=passages.INK,
            cell={"executed": grid.EXECUTED, "skipped": grid.SKIPPED, "always": grid.ALWAYS},
        )
    )


def render_comparison(comparison: Comparison) -> str:
    """The page about several runs as HTML; it needs no network and no other file."""
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            names=comparison.names,
            colours=drawing.RUNS,
            table=compare.table(comparison),
            cautions=cautions.cautions(comparison.named),
            first=next((name for name, run in comparison.named.items() if run.history.valid), None),
            units=[routing_view.units(run) for run in comparison.runs],
            plots=[(plot, Markup(plot.svg or "")) for plot in compare_figures.plots(comparison)],
        )
    )
