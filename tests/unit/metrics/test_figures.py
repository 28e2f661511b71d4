"""The figures of a report show what there is, few steps included."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from pages import Page, only_metrics, report, routed_run

from megaroute.metrics import drawing, figures
from megaroute.metrics.history import History
from megaroute.metrics.run_view import RunView


def test_few_steps_have_one_curve(tmp_path, train_record):
    def loss(steps):
        records = [train_record(step) for step in range(1, steps + 1)]
        return figures.plots(RunView.open(only_metrics(tmp_path, records)))[0]

    assert "running mean" not in loss(79).svg and "running mean" not in loss(79).text
    assert "running mean" in loss(80).svg and "Strong: running mean" in loss(80).text


def test_one_step_shows_what_it_executed(tmp_path, train_record):
    run = RunView.open(routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"]))
    one = dataclasses.replace(run, history=History(run.history.records[:2]))
    (figure,) = [plot for plot in figures.plots(one) if plot.title == "Arithmetic per step"]
    areas = re.findall(r'<g id="[^"]*FillBetween.*?\sd="([^"]*)"', figure.svg, flags=re.DOTALL)
    assert len(areas) == 3
    for area in areas:
        assert len(set(re.findall(r"[ML] (\S+) ", area))) == 2  # it has a width


def test_the_target_is_in_the_legend(tmp_path, train_record):
    run = RunView.open(routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"]))
    (figure,) = [plot for plot in figures.plots(run) if plot.title == "Density per routed unit"]
    assert figure.svg.count(">target<") == 1 and "Dots" not in figure.text


def test_many_layers_become_a_heat_map(tmp_path, train_record):
    records = [train_record(step, density=(0.5,) * 12) for step in range(1, 30)]
    text = Page(report(only_metrics(tmp_path, records))).text
    assert "White is on target" in text


def test_many_units_with_several_targets_have_a_heat_map(tmp_path, train_record):
    routing = {"unit": "separate", "densities": [0.2, 0.3, 0.5, 0.5, 0.75]}
    units = [f"{layer} {part}" for layer in range(5) for part in ("attention", "mlp")]
    run = RunView.open(routed_run(tmp_path, train_record, routing, units, num_layers=5))
    assert run.targets() == (0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75)
    text = report(tmp_path)
    assert "White is on target" in Page(text).text
    # What is drawn is the distance from the targets, which goes both ways.
    assert "\N{MINUS SIGN}100%" in text or "-100%" in text
    assert "distance to target" in text and "less its target" in text


def test_thin_keeps_the_spikes():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[54_321], y[70_000], y[:500] = 9.0, -9.0, np.nan
    few_x, few_y = drawing.thin(x, y)
    assert len(few_x) <= drawing.MOST_POINTS
    assert {54_321.0, 70_000.0} <= set(few_x)
    assert np.nanmax(few_y) == 9.0 and np.nanmin(few_y) == -9.0
    assert (np.diff(few_x) > 0).all()


def test_smooth_is_the_mean_of_what_is_finite():
    y = np.arange(160.0)
    y[80] = np.nan
    smooth = drawing.smooth(y)
    assert smooth[40] == pytest.approx(40.0)
    assert smooth[80] == pytest.approx(80.0)
    assert smooth[0] == pytest.approx(np.mean(y[:3]))
    assert np.isnan(drawing.smooth(np.array([np.nan]))).all()


def test_every_figure_is_well_formed_svg(finished_page):
    for svg in re.findall(r"<svg.*?</svg>", finished_page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
