"""The log line says what a person asks first; the progress bar and the log do not write into each other."""

import io
import logging

import pytest

from megaroute.common import log
from megaroute.metrics.console import LogSink, ProgressSink
from megaroute.metrics.load_text import density_text
from megaroute.metrics.records import EventRecord


def log_sink(**changes):
    values = {"every": 5, "start_step": 0, "steps": 20, "units": ("2", "3 mlp"), "device": "cpu", "precision": "fp32"}
    return LogSink(**{**values, "devices": 2, "target": lambda step: 0.5, **changes})


def messages(logged):
    return [record.getMessage() for record in logged]


def test_lines_come_at_the_first_step_every_interval_and_the_last(logged, train_record):
    sink = log_sink(every=5, start_step=7, steps=18)
    for step in range(8, 19):
        sink.train(train_record(step))
    assert [m.split(" | ")[0] for m in messages(logged)] == ["step 8/18", "step 10/18", "step 15/18", "step 18/18"]


def test_the_line_holds_the_numbers(logged, train_record):
    sink = log_sink()
    sink.train(
        train_record(
            1, loss=2.5, grad_norm=0.8125, density=(0.25, 0.75), lr=3e-4, executed_flops=6e11, dense_flops=8e11
        )
    )
    assert messages(logged)[0].split(" | ") == [
        "step 1/20",
        "loss 2.5000",
        "grad norm 0.812",
        "8.19k tokens/s",
        "1.2 TFLOP/s executed, 1.6 TFLOP/s dense-equivalent",
        "density 50.0 % of 50.0 % (layer 2 25.0 % to layer 3 mlp 75.0 %)",
        "lr 3.00e-04",
        "eta 10s",
    ]


def test_speed_is_the_mean_of_the_interval_over_time(logged, train_record):
    sink = log_sink(every=5, start_step=10)
    sink.train(train_record(11))
    sink.train(train_record(12, seconds=1.0, tokens_per_second=1000.0, executed_flops=1e12))
    sink.train(train_record(15, seconds=3.0, tokens_per_second=3000.0, executed_flops=7e12))
    assert "2.5k tokens/s | 2 TFLOP/s executed, 4 GFLOP/s dense-equivalent" in messages(logged)[1]
    assert messages(logged)[1].endswith("eta 10s")


def test_utilisation_is_shown_where_the_device_is_known(logged, train_record):
    log_sink(device="NVIDIA A100-SXM4-80GB", precision="bf16", devices=4).train(
        train_record(1, seconds=1.0, executed_flops=312e12, dense_flops=416e12)
    )
    assert "MFU 25.0 % executed, 33.3 % dense-equivalent" in messages(logged)[0]


def test_a_dense_model_has_one_rate(logged, train_record):
    log_sink(device="NVIDIA A100-SXM4-80GB", precision="bf16", devices=4, units=()).train(
        train_record(1, seconds=1.0, executed_flops=312e12, dense_flops=312e12, density=())
    )
    assert "| 312 TFLOP/s executed | MFU 25.0 % executed | no routed unit" in messages(logged)[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"overflow": (0, 0), "load": {"ranks": 1.004, "stages_max_over_mean": 1.0, "units": (1.0, 1.0)}}, ""),
        # 100 tokens a step, of which the units kept 50 and 55.
        ({"overflow": (50, 0)}, " | overflow 32.3 % (most layer 2 50.0 %)"),
        ({"load": {"ranks": 1.126}}, " | load max/mean: ranks 1.13"),
        (
            {"load": {"ranks": 1.02, "stages_max_over_mean": 1.25, "units": (1.0, 1.5)}},
            " | load max/mean: ranks 1.02, stages 1.25, replicas 1.50 in layer 3 mlp",
        ),
    ],
)
def test_load_and_overflow_are_said_when_there_is_something_to_say(logged, train_record, changes, said):
    log_sink().train(train_record(1, seconds=0.5, tokens_per_second=200.0, **changes))
    assert f"layer 3 mlp 55.0 %){said} | lr" in messages(logged)[0]


def test_overflow_and_load_are_means_since_the_last_line(logged, train_record):
    sink = log_sink(every=2, start_step=-9)
    for step, over, load in ((1, 50, 1.2), (2, 0, 1.0), (3, 0, 1.0), (4, 0, 1.0)):
        sink.train(
            train_record(step, tokens_per_second=200.0, density=(0.5, 0.5), overflow=(over, 0), load={"ranks": load})
        )
    assert "overflow 16.7 % (most layer 2 25.0 %) | load max/mean: ranks 1.10 |" in messages(logged)[0]
    assert "overflow" not in messages(logged)[1] and "load" not in messages(logged)[1]


def test_a_skipped_update_is_said(logged, train_record):
    log_sink().train(train_record(1, skipped_update=True, nonfinite=2))
    assert "update skipped" in messages(logged)[0] and "2 in a row" in messages(logged)[0]


def test_validation_and_events_are_logged(logged, valid_record):
    sink = log_sink()
    sink.valid(valid_record(5))
    sink.event(EventRecord(kind="resume", step=5, attempt=2, message="resumed from step 5"))
    sink.event(EventRecord(kind="alarm", step=5, attempt=2, message="layer 3 collapsed"))
    sink.event(EventRecord(kind="recovered", step=5, attempt=2, message="layer 3 is well"))
    assert "valid loss 3.1000 | 1.2500 bits per byte" in messages(logged)[0]
    assert "validation density 50.0 % of 50.0 % (layer 2 48.0 % to layer 3 mlp 52.0 %) | 64 rows" in messages(logged)[0]
    assert messages(logged)[1:] == [
        "resumed from step 5",
        "step 5/20 | alarm | layer 3 collapsed",
        "step 5/20 | recovered | layer 3 is well",
    ]
    assert [r.levelno for r in logged] == [logging.INFO, logging.INFO, logging.WARNING, logging.INFO]


@pytest.mark.parametrize(
    "units, density, target, text",
    [
        ((), (), None, "no routed unit"),
        (("4",), (0.5,), 0.25, "density 50.0 % of 25.0 %"),
        (("0 mlp", "1 mlp"), (1.0, 0.9), None, "density 95.0 % (layer 1 mlp 90.0 % to layer 0 mlp 100.0 %)"),
    ],
)
def test_density_text(units, density, target, text):
    assert density_text(units, density, target) == text


def test_log_lines_are_written_above_the_bar(monkeypatch, train_record):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    log.configure()
    logger = log.get_logger()
    before = list(logger.handlers)
    bar = ProgressSink(start_step=5, steps=20)
    try:
        for step in (6, 7):
            bar.train(train_record(step, loss=2.5))
        logger.info("a line of the log")
        bar.train(train_record(8, loss=2.25))
    finally:
        bar.close()
        assert logger.handlers == before
        logger.handlers.clear()
    painted = [part for line in screen.getvalue().split("\n") for part in line.split("\r")]
    assert any(part.endswith("a line of the log") and "step/s" not in part for part in painted)
    assert "8/20" in painted[-2] and "loss 2.2500" in painted[-2]
