"""The report is one whole page, whatever the run left behind."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from megaroute.common.errors import UserError
from megaroute.metrics import drawing, summary
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
    assert spans[1]["title"] == '" cat": 3 of 4 layers, skipped 2; predicting the next token cost 0.25 nats'


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
    assert "Steps completed: 1. The run goes on, or was cut off" in page.text
    assert "This run has not validated" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5


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


def test_many_layers_become_a_heat_map(tmp_path, train_record):
    records = [train_record(step, density=(0.5,) * 12) for step in range(1, 30)]
    text = Page(report(only_metrics(tmp_path, records))).text
    assert "White is on target" in text


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
    share = 100 * (6e9 / 0.5) / (4 * 66.9e12)
    notes = " ".join(fact.note for fact in summary.results(RunView.open(finished_run)))
    assert f"{share:.1f} % of the devices' peak (MFU)" in notes


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
