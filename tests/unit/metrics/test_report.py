"""The report is one whole page, whatever the run left behind."""

import json
import os
import re
import time

import pytest
import yaml
from pages import Page, only_metrics, report

from megaroute.common.errors import UserError
from megaroute.metrics import alarms, summary
from megaroute.metrics.records import EventRecord, to_json
from megaroute.metrics.report import write_report
from megaroute.metrics.run_view import RunView


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
