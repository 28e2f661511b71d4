"""The report is one whole page, whatever the run left behind."""

import dataclasses
import json
import os
import re
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from megaroute.common.errors import UserError
from megaroute.metrics import alarms, drawing, figures, formats, routing_text, routing_view, summary
from megaroute.metrics.history import History
from megaroute.metrics.records import EventRecord, to_json
from megaroute.metrics.report import write_report
from megaroute.metrics.run_view import RunView

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Balanced tags, their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def attributes(self, name):
        return [given[name] for _, given in self.tags if name in given]


def report(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def only_metrics(run_dir, records, tail=""):
    (run_dir / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records) + tail)
    return run_dir


def test_a_finished_run_shows_everything(finished_page):
    page = Page(finished_page)
    for words in (
        "small",
        "Steps completed: 20 of 20. The run's last word: all steps are done.",
        "5.24M parameters, layers 4, hidden 32",
        "2 of 4 layers carry a router (2-3), target density 50.0 %",
        "4 x NVIDIA H100 80GB HBM3; fp32",
        "1.1250 bits per byte",
        "75.0 % of dense",
        "2, all bit-equal",
        "layer 3 collapsed",
        "asked to stop by SIGUSR1",
        "Held-out text as the model routes it after step 20",
    ):
        assert words in page.text
    assert "What is missing" not in page.text
    assert page.text.count("tokens/s") >= 2
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 6 + 1


def test_the_page_needs_no_network_and_no_other_file(finished_page):
    page = Page(finished_page)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    targets = page.attributes("href") + page.attributes("xlink:href") + page.attributes("src")
    assert all(target.startswith("#") for target in targets)
    assert "@import" not in finished_page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", finished_page))


def test_ids_are_unique_and_every_reference_leads_somewhere(finished_page):
    ids = Page(finished_page).attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', finished_page)
    assert used and {a or b for a, b in used} <= set(ids)


def test_the_same_run_gives_the_same_bytes(finished_run, finished_page):
    assert report(finished_run) == finished_page


def test_every_figure_is_well_formed_svg(finished_page):
    for svg in re.findall(r"<svg.*?</svg>", finished_page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_text_from_the_run_is_escaped_and_can_be_written(finished_run, trace_json):
    evil, half_a_surrogate_pair = '"><script>alert(1)</script>', "\ud83d"
    (finished_run / "config.yaml").write_text(json.dumps({"run": {"name": evil}}))
    trace_json["passages"][0]["tokens"][:2] = [half_a_surrogate_pair, evil]
    (finished_run / "routing_trace.json").write_text(json.dumps(trace_json))
    with open(finished_run / "metrics.jsonl", "a") as file:
        file.write(to_json(EventRecord(kind="alarm", step=20, attempt=2, message=evil)) + "\n")
    text = report(finished_run)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 4


def test_tokens_carry_their_colour_and_title(finished_page):
    page = Page(finished_page)
    spans = [given for tag, given in page.tags if tag == "span" and "title" in given]
    assert [span["class"] for span in spans] == ["e4", "e3", "e2", "e3"]
    assert spans[1]["title"] == '" cat": 3 of 4 layers, skipped layer 2; predicting the next token cost 0.25 nats'


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_says_so(tmp_path):
    page = Page(report(only_metrics(tmp_path, [])))
    assert "No step has been completed yet." in page.text
    assert "There is no routing_trace.json" in page.text
    assert "config.yaml could not be read (there is no such file)" in page.text
    assert "metrics.jsonl has no record yet." in page.text


def test_one_step_has_figures_and_no_end(tmp_path, train_record):
    page = Page(report(only_metrics(tmp_path, [train_record(1)], tail='{"kind": "train", "st')))
    assert "Steps completed: 1. The run goes on: its last record was 0s old" in page.text
    assert "This run has not validated" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5


def test_a_run_that_fell_silent_was_cut_off(tmp_path, train_record):
    run_dir = only_metrics(tmp_path, [train_record(1, 1), train_record(2, 1), train_record(3, 2)])
    assert [attempt.ending for attempt in summary.attempts(RunView.open(run_dir))] == [
        "cut off: no end recorded",
        "goes on",
    ]
    an_hour_ago = time.time() - 3600
    os.utime(run_dir / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    run = RunView.open(run_dir)
    assert "was cut off, without an end: its last record was 1h 00m old" in summary.state(run)
    assert summary.attempts(run)[1].ending == "cut off: no end recorded"
    # Steps of ten minutes: an hour of silence is nothing yet.
    slow = only_metrics(tmp_path, [train_record(1, seconds=600.0)])
    os.utime(slow / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    assert "The run goes on" in summary.state(RunView.open(slow))


def test_the_first_failure_is_the_end(tmp_path, train_record):
    failed = [EventRecord(kind="error", step=1, attempt=1, message=f"failed on rank {rank}: why.") for rank in (3, 0)]
    run = RunView.open(only_metrics(tmp_path, [train_record(1), *failed]))
    assert summary.state(run) == "Steps completed: 1. The run failed on rank 3: why."


@pytest.mark.parametrize(
    "config, ended, validation, trace",
    [
        ({}, True, "data.valid is not given", "it needs validation data"),
        ({"data": {"valid": "v"}}, True, "train.validate_every is not given", "it was not written"),
        (
            {"data": {"valid": "v"}, "train": {"validate_every": 50, "steps": 100}},
            False,
            "the first is due after step 50",
            "written at the end of a run, to which this one has not come",
        ),
        ({"data": {"valid": "v"}, "metrics": {"trace_samples": 0}}, True, "not given", "trace_samples is 0"),
    ],
)
def test_what_is_missing_has_its_true_reason(tmp_path, train_record, config, ended, validation, trace):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "x"}, **config}))
    end = [EventRecord(kind="end", step=1, attempt=1, message="finished 1 step")] if ended else []
    page = Page(report(only_metrics(tmp_path, [train_record(1), *end])))
    assert f"This run has not validated: {validation}" in page.text or validation in page.text
    assert "There is no routing_trace.json, so single tokens are not shown" in page.text and trace in page.text


def test_damaged_lines_are_named(tmp_path, train_record):
    (tmp_path / "metrics.jsonl").write_text("torn\n" + to_json(train_record(1)) + "\n")
    assert RunView.open(tmp_path).gaps[0].startswith("Line 1 of metrics.jsonl could not be read")


@pytest.mark.parametrize("content", ["]", "3", "{}", '{"format": 7}', "\xff"])
def test_a_trace_that_cannot_be_read_is_named(finished_run, content):
    (finished_run / "routing_trace.json").write_text(content, encoding="latin-1")
    run = RunView.open(finished_run)
    assert run.trace is None
    assert [gap for gap in run.gaps if gap.startswith("routing_trace.json could not be read: ")]


@pytest.mark.parametrize(
    "content", ["a: [", "- 1", "run: 3\nmodel: [1]\ntrain: {steps: null}\nrouting: {density: [1]}"]
)
def test_another_configuration_does_not_stop_the_page(finished_run, content):
    (finished_run / "config.yaml").write_text(content)
    run = RunView.open(finished_run)
    assert summary.state(run).startswith("Steps completed: 20. ")
    assert summary.shape(run) and summary.results(run)


def test_a_run_without_routers(tmp_path, train_record):
    records = [train_record(step, density=(), executed_flops=8e9) for step in range(1, 4)]
    text = Page(report(only_metrics(tmp_path, records))).text
    assert "no layer carries a router" in text
    assert "100.0 % of dense" in text


def test_a_page_without_skipping_does_not_talk_of_it(tmp_path, train_record, trace_json):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "x"}, "routing": {"router": "dense"}}))
    (tmp_path / "routing_trace.json").write_text(json.dumps({**trace_json, "routed_layers": [], "passages": []}))
    records = [train_record(step, density=(), executed_flops=8e9) for step in range(1, 4)]
    text = Page(report(only_metrics(tmp_path, records))).text
    assert "A language model without routers" in text
    assert "skip" not in text


def test_experts_have_their_shares(tmp_path, train_record):
    routing = {"router": "moe", "unit": "mlp", "layers": [1], "moe": {"experts": 2, "top_k": 2}}
    # 4096 tokens, two choices each.
    changes = {"choices": ((6144, 2048),), "overflow": (1024,), "density": (0.9,)}
    page = Page(report(routed_run(tmp_path, train_record, routing, ["1 mlp"], **changes)))
    assert "every token chooses among experts" in page.text and "skip" not in page.text
    assert "router moe, 2 experts, 2 a token, capacity factor 1.25" in page.text
    assert "Unit Expert 0 Expert 1 Uneven layer 1 mlp 75.0 % 25.0 % 1.500" in page.text
    assert "Overflow 12.5 % of what the routers wanted found no capacity" in page.text


def test_the_routing_line_names_what_shapes_the_routing(tmp_path, train_record, valid_record):
    routing = {
        "router": "gumbel",
        "layers": [1, 2],
        "dispatch": {"mode": "capacity"},
        "capacity": {"factor": 1.5, "scope": "stage"},
        "budget": {"weight": 0.02},
        "controller": {"gain": 2.0},
        "benefit": "second_order",
    }
    run_dir = routed_run(tmp_path, train_record, routing, ["1", "2"])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(to_json(valid_record(30, density=(0.2, 0.4))) + "\n")
    run = RunView.open(run_dir)
    for said in (
        "dispatch capacity, capacity factor 1.5 of each stage",
        "estimator st_gumbel, benefit second_order, budget weight 0.02, controller gain 2",
    ):
        assert said in routing_text.routing_text(run)
    facts = {fact.label: fact.value for fact in summary.results(run)}
    assert facts["Validation density"] == "30.0 %" and facts["Overflow"] == "2.0 %"


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


def routed_run(run_dir, train_record, routing, units, num_layers=4, **changes):
    """Files of a run of 30 steps with a routing section."""
    config = {"run": {"name": "routed"}, "model": {"num_layers": num_layers}, "routing": routing}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    start = EventRecord(kind="start", step=0, attempt=1, message="started", values={"units": units})
    recorded = {
        "flops": {"mlp": 4e9, "attention": 1.5e9, "padding": 0.5e9},
        "rows": tuple(2100 for _ in units),
        "overflow": tuple(41 for _ in units),
        "overflow_flops": 3e8,
        "load": {"ranks": 1.25, "units": tuple(1.5 for _ in units), "stages": (30.0, 10.0)},
    }
    density = tuple(0.5 for _ in units)
    records = [train_record(step, **{"density": density, **recorded, **changes}) for step in range(1, 31)]
    return only_metrics(run_dir, [start, *records])


def table_cells(text):
    """Rows of the table of units."""
    table = re.search(r'<table class="numbers">(.*?)</table>', text, flags=re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows[1:]]


def test_every_unit_has_its_row(tmp_path, train_record):
    routing = {"unit": "separate", "layers": [1, 3], "densities": [0.25, 0.75]}
    units = ["1 attention", "1 mlp", "3 attention", "3 mlp"]
    text = report(routed_run(tmp_path, train_record, routing, units))
    # 4096 tokens a step.
    shared = ["50.0 %", "none", "51.3 %", "2.0 %", "1.500"]
    assert table_cells(text) == [
        ["layer 1 attention", "25.0 %", *shared],
        ["layer 1 mlp", "25.0 %", *shared],
        ["layer 3 attention", "75.0 %", *shared],
        ["layer 3 mlp", "75.0 %", *shared],
    ]
    page = Page(text)
    assert "2 of 4 layers carry a router (1, 3), attention and MLP each their own" in page.text
    assert "target density 25.0 % to 75.0 %" in page.text


def test_an_annealed_target_is_a_line_over_time(tmp_path, train_record):
    routing = {"layers": [1, 2], "density_anneal": {"start": 1.0, "steps": 10, "after": 5}}
    run = RunView.open(routed_run(tmp_path, train_record, routing, ["1", "2"]))
    assert run.targets(1) == run.targets(6) == (1.0, 1.0)
    assert run.targets(11) == (0.75, 0.75)
    assert run.targets(16) == run.targets() == (0.5, 0.5)
    text = report(tmp_path)
    assert table_cells(text)[0][:3] == ["layer 1", "100.0 % to 50.0 %", "50.0 %"]
    assert "target density 50.0 %, from 100.0 % in steps 5 to 15" in Page(text).text


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


@pytest.mark.parametrize("router", ["highway", "moe"])
def test_what_computes_everything_has_no_target(tmp_path, train_record, router):
    run = RunView.open(routed_run(tmp_path, train_record, {"router": router, "unit": "mlp"}, ["1 mlp", "2 mlp"]))
    assert run.targets() == run.targets(3) == (None, None)
    assert "target" not in summary.shape(run)[1].value
    assert ("experts in place of the MLP" in summary.shape(run)[1].value) == (router == "moe")
    assert [row[1] for row in table_cells(report(tmp_path))] == ["none", "none"]


def test_the_arithmetic_is_told_by_part(tmp_path, train_record):
    run = RunView.open(routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"]))
    facts = {fact.label: fact for fact in routing_view.arithmetic(run)}
    assert facts["MLP"].value == formats.si(4e9 / 4096, "FLOP")
    assert facts["MLP"].note == "66.7 % of executed"
    assert facts["thrown away"].note == "8.3 % of executed"
    assert facts["executed"].note == "75.0 % of dense"
    assert facts["overflow"].value == formats.si(3e8 / 4096, "FLOP")
    parts = [facts[name] for name, _ in drawing.PARTS.values()]
    assert sum(float(fact.note.split()[0]) for fact in parts) == pytest.approx(100.0, abs=0.2)


def test_load_and_overflow_are_shown_where_there_is_any(tmp_path, train_record):
    run_dir = routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"])
    page = Page(report(run_dir))
    assert "Load of the ranks" in page.text and "Share of what the routers wanted" in page.text
    assert "Ranks 1.250" in page.text and "Stages 75.0 %, 25.0 %" in page.text
    even = {"ranks": 1.0, "units": (1.0, 1.0), "stages": (20.0,)}
    run_dir = routed_run(tmp_path, train_record, {"layers": [1, 2]}, ["1", "2"], overflow=(0, 0), load=even)
    page = Page(report(run_dir))
    assert "Load of the ranks" not in page.text and "Share of what the routers wanted" not in page.text
    assert "Ranks 1.000" in page.text and "Stages" not in page.text


def test_a_run_of_an_earlier_version_says_what_it_did_not_record(finished_page):
    assert table_cells(finished_page)[0] == [
        "layer 2",
        "50.0 %",
        "50.0 %",
        "48.0 %",
        "not recorded",
        "not recorded",
        "not recorded",
    ]
    assert "Where the arithmetic went" not in finished_page


def test_of_many_alarms_the_first_are_listed(tmp_path):
    events = [EventRecord(kind="alarm", step=step, attempt=1, message=f"alarm {step}.") for step in range(1, 21)]
    page = Page(report(only_metrics(tmp_path, events)))
    assert "Step 12: alarm 12." in page.text and "alarm 13." not in page.text
    assert "8 more are in metrics.jsonl." in page.text


def test_the_end_of_an_alarm_is_told(tmp_path, train_record):
    def event(kind, step, attempt=1, unit="2", topic="density"):
        values = {"unit": unit, "topic": topic}
        return EventRecord(kind=kind, step=step, attempt=attempt, message=f"{kind} {unit}", values=values)

    records = [
        EventRecord(kind="alarm", step=9, attempt=1, message="not applied"),
        event("alarm", 50),
        event("alarm", 52, topic="overflow"),
        event("alarm", 60, unit="3 mlp"),
        event("recovered", 74),
        train_record(89),
        event("alarm", 95, attempt=2),
    ]
    page = Page(report(only_metrics(tmp_path, records)))
    for said in (
        "Step 9: not applied",
        "Step 50 to 74, recovered: alarm 2",
        "Step 52 to 89, when attempt 1 ended: alarm 2",
        "Step 60 to 89, when attempt 1 ended: alarm 3 mlp",
        "From step 95 on: alarm 2",
    ):
        assert said in page.text
    assert alarms.count(RunView.open(tmp_path).history) == "5, of which 1 recovered"


def test_what_is_not_finite_leaves_a_gap(tmp_path, train_record):
    nan = float("nan")
    records = [train_record(1), train_record(2, loss=nan, grad_norm=nan, skipped_update=True, nonfinite=1)]
    assert "Updates left out 1" in Page(report(only_metrics(tmp_path, records))).text


def test_a_run_that_never_was_finite_has_a_page(tmp_path, train_record):
    nan = float("nan")
    records = [train_record(step, loss=nan, grad_norm=nan) for step in (1, 2)]
    assert "nan nats per token" in Page(report(only_metrics(tmp_path, records))).text


def test_a_resume_that_differs_is_told(tmp_path, train_record):
    records = [train_record(1, 1), train_record(2, 1, loss=4.0), train_record(2, 2, loss=4.4)]
    facts = {fact.label: fact for fact in summary.results(RunView.open(only_metrics(tmp_path, records)))}
    assert facts["Steps computed twice"].value == "1, 1 differ"
    assert facts["Steps computed twice"].note == "first at step 2 in loss; losses differ by 1.0e-01 relative at most"


def test_results_are_means_of_the_last_tenth(finished_run):
    run = RunView.open(finished_run)
    last = summary.final(run.history.train)
    assert [record.step for record in last] == [19, 20]
    loss = sum(record.loss for record in last) / 2
    assert f"{loss:.4f} nats per token" in [fact.value for fact in summary.results(run)]


def test_utilisation_uses_the_devices_of_the_start(finished_run):
    executed, dense = (100 * (flops / 0.5) / (4 * 66.9e12) for flops in (6e13, 8e13))
    path = finished_run / "metrics.jsonl"
    path.write_text(path.read_text().replace("6000000000.0", "6e13").replace("8000000000.0", "8e13"))
    facts = {fact.label: fact for fact in summary.results(RunView.open(finished_run))}
    assert facts["Utilisation"].value == f"{executed:.1f} %"
    assert f"on executed FLOPs; {dense:.1f} % on dense-equivalent FLOPs" in facts["Utilisation"].note


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
