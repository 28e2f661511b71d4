"""Sinks write what they are given, and nothing is lost to a torn line."""

import builtins
import math

import pytest

from megaroute.common.errors import ConfigError
from megaroute.metrics.history import read_history
from megaroute.metrics.records import EventRecord, to_json
from megaroute.metrics.sinks import JsonlSink, NullSink, TensorBoardSink


def test_jsonl_appends_over_attempts(tmp_path, train_record, valid_record):
    path = tmp_path / "metrics.jsonl"
    event = EventRecord(kind="checkpoint", step=1, attempt=1, message="saved")
    for step in (1, 2):
        sink = JsonlSink(path)
        sink.train(train_record(step))
        sink.valid(valid_record(step))
        sink.event(event)
        sink.close()
    expected = [train_record(1), valid_record(1), event, train_record(2), valid_record(2), event]
    assert list(read_history(path).records) == expected


def test_jsonl_is_on_disk_after_each_record(tmp_path, train_record):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.train(train_record(1))
    assert path.read_text() == to_json(train_record(1)) + "\n"
    sink.close()


def test_jsonl_writes_a_line_with_one_write(tmp_path, train_record):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    writes: list[bytes] = []
    file, sink._file = sink._file, type("Spy", (), {"write": lambda self, data: writes.append(data)})()
    sink.train(train_record(1))
    file.close()
    assert len(writes) == 1 and writes[0].endswith(b"\n")


def test_jsonl_ends_a_torn_line_before_it_goes_on(tmp_path, train_record):
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_json(train_record(1)) + "\n" + to_json(train_record(2))[:30])
    sink = JsonlSink(path)
    sink.train(train_record(2, 2))
    sink.close()
    history = read_history(path)
    assert [(r.step, r.attempt) for r in history.train] == [(1, 1), (2, 2)]
    assert history.damaged == (2,)


def test_the_null_sink_takes_everything(train_record, valid_record):
    sink = NullSink()
    sink.train(train_record())
    sink.valid(valid_record())
    sink.event(EventRecord(kind="end", step=1, attempt=1, message=""))
    sink.close()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_without_deepspeed_communication(tmp_path, train_record, valid_record):
    from deepspeed.comm import comm

    before = comm.cdb
    sink = TensorBoardSink(tmp_path, attempt=2, units=("2", "3 mlp"), every=2)
    for step in (1, 2, 3, 4):
        loss = math.inf if step == 4 else 0.5
        recorded = {} if step == 4 else {"overflow": (1, 2), "flops": {"mlp": 3e9}, "load": {"ranks": 1.5}}
        sink.train(train_record(step, density=(0.25, 0.75), loss=loss, **recorded))
    sink.valid(valid_record(4, bits_per_byte=1.25))
    sink.close()
    assert comm.cdb is before

    written = scalars(tmp_path / "attempt-2")
    assert written["loss/train"] == [(2, 0.5), (4, math.inf)]
    assert written["density/layer_03_mlp"] == [(2, 0.75), (4, 0.75)]
    assert written["speed/executed_share"] == [(2, 0.75), (4, 0.75)]
    assert written["loss/valid_bits_per_byte"] == [(4, 1.25)]
    assert written["density/layer_02"] == [(2, 0.25), (4, 0.25)]
    assert written["overflow/layer_03_mlp"] == [(2, 2.0)]
    assert written["flops/mlp"] == [(2, 3e9)]
    assert written["load/max_over_mean"] == [(2, 1.5)]


def test_tensorboard_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    genuine = builtins.__import__

    def without_tensorboard(name, *rest):
        if name.split(".")[0] == "tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ConfigError, match=r"^metrics\.tensorboard .*metrics\.tensorboard=false$"):
        TensorBoardSink(tmp_path, attempt=1, units=())
