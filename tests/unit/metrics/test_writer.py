"""The writer tells every sink, and knows what a start or a resume must record."""

import logging

import pytest

from megaroute.metrics.history import read_history
from megaroute.metrics.records import EventRecord
from megaroute.metrics.writer import MetricsWriter


def writer(run_dir, config, **changes):
    values = {"start_step": 0, "attempt": 1, "device_name": "cpu", "world_size": 4, "units": ("2", "3")}
    return MetricsWriter(run_dir, config, **{**values, **changes})


def test_file_and_log_get_every_kind(tmp_path, run_config, train_record, valid_record, logged):
    metrics = writer(tmp_path, run_config)
    metrics.train(train_record(1))
    metrics.valid(valid_record(1))
    metrics.event(EventRecord(kind="checkpoint", step=1, attempt=1, message="saved"))
    metrics.close()
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.train, history.valid) == ((train_record(1),), (valid_record(1),))
    assert [event.message for event in history.events] == ["saved"]
    assert [record.levelno for record in logged] == [logging.INFO] * 3
    assert not (tmp_path / "tensorboard").exists()


def test_a_start_tells_of_the_machine(tmp_path, run_config, logged):
    metrics = writer(tmp_path, run_config)
    metrics.event(EventRecord(kind="start", step=0, attempt=1, message="go", values={"parameters": 5}))
    metrics.event(EventRecord(kind="stop", step=0, attempt=1, message="stop"))
    metrics.close()
    start, stop = read_history(tmp_path / "metrics.jsonl").events
    assert start.values == {"device": "cpu", "world_size": 4, "units": ("2", "3"), "parameters": 5}
    assert stop.values == {}


def test_there_is_no_bar_without_a_terminal(tmp_path, run_config, train_record, capsys):
    metrics = writer(tmp_path, run_config)
    metrics.train(train_record(1))
    metrics.close()
    assert "step/s" not in capsys.readouterr().err


def test_there_is_a_bar_on_a_terminal(tmp_path, run_config, train_record, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    metrics = writer(tmp_path, run_config)
    metrics.train(train_record(1))
    metrics.close()
    assert "1/20" in capsys.readouterr().err


def test_every_sink_is_closed_though_one_fails(tmp_path, run_config):
    metrics = writer(tmp_path, run_config)
    first, second = metrics._sinks
    closed = []

    def fail():
        raise OSError("disk full")

    second.close, first_close = fail, first.close
    first.close = lambda: (closed.append("first"), first_close())
    with pytest.raises(OSError, match="disk full"):
        metrics.close()
    assert closed == ["first"]


@pytest.mark.parametrize("router, said", [("gumbel", "density 52.5 % of 50.0 %"), ("highway", "density 52.5 % (")])
def test_the_log_names_the_target_where_there_is_one(tmp_path, run_config, train_record, logged, router, said):
    routing = run_config.routing.model_copy(update={"router": router})
    metrics = writer(tmp_path, run_config.model_copy(update={"routing": routing}))
    metrics.train(train_record(1))
    metrics.close()
    assert said in logged[0].getMessage()
