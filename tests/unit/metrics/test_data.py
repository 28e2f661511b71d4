"""What metrics, log and report say of the data."""

import pytest

from megaroute.metrics import summary
from megaroute.metrics.console import LogSink
from megaroute.metrics.history import differences
from megaroute.metrics.records import from_json, to_json
from megaroute.metrics.run_view import RunView

pytestmark = pytest.mark.data

DIGEST = "0123456789abcdef" * 2
DATA = {"digest": DIGEST, "tokens": {"books": 700, "peps": 300}, "skipped": 0, "wait_s": 0.0}


def log_line(logged, record) -> list[str]:
    where = {"units": ("2", "3"), "device": "cpu", "precision": "fp32", "devices": 1}
    LogSink(every=1, start_step=0, steps=20, target=lambda step: 0.5, **where).train(record)
    return logged[-1].getMessage().split(" | ")


def facts(folder, records) -> dict[str, summary.Fact]:
    (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
    return {fact.label: fact for fact in summary.results(RunView.open(folder))}


def test_a_record_loads_back_with_its_data_and_knows_the_shares(train_record):
    record = from_json(to_json(train_record(data=DATA)))
    assert record.data["digest"] == DIGEST
    assert record.data_shares == {"books": 0.7, "peps": 0.3}
    assert train_record().data_shares == {}


def test_rows_that_differ_are_a_difference_and_what_was_not_recorded_is_none(train_record):
    a, b = train_record(data=DATA), train_record(data={**DATA, "digest": "f" * 32})
    assert differences(a, b) == ("data",)
    assert differences(a, train_record(data={**DATA, "wait_s": 3.0})) == ()
    assert differences(a, train_record()) == ()


def test_the_log_shows_shares_of_several_sources_and_a_wait_above_a_percent(logged, train_record):
    assert "books 70.0 %, peps 30.0 %" in log_line(logged, train_record(data=DATA))
    assert log_line(logged, train_record(data={**DATA, "tokens": {"train": 5}})) == log_line(logged, train_record())
    waited = train_record(seconds=2.0, data={**DATA, "wait_s": 0.5})
    assert "waiting for data 25.0 %" in log_line(logged, waited)


def test_the_report_shows_shares_checksum_wait_and_damage(tmp_path, train_record):
    shown = facts(tmp_path, [train_record(1, data=DATA), train_record(2, data={**DATA, "wait_s": 0.25, "skipped": 3})])
    assert shown["Sources"].value == "books 70.0 %, peps 30.0 %"
    assert shown["Data checksum"].value == DIGEST and "32 rows" in shown["Data checksum"].note
    assert shown["Waiting for data"].value == "25.0 %"
    assert shown["Damaged slices"].value == "3"


def test_the_report_of_an_earlier_version_has_no_word_of_it(tmp_path, train_record):
    assert not {"Sources", "Data checksum", "Waiting for data", "Damaged slices"} & set(
        facts(tmp_path, [train_record(1)])
    )
