"""Records, a configuration and run directories for the tests of metrics."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaroute.common.log import ROOT
from megaroute.config.root import Config
from megaroute.metrics.records import EventRecord, TrainRecord, ValidRecord, to_json
from megaroute.metrics.report import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))


@pytest.fixture(scope="session")
def train_record() -> Callable[..., TrainRecord]:
    """Builds the record of a step; its loss follows from the step alone, as a resumed run's would."""

    def build(step: int = 1, attempt: int = 1, **changes: Any) -> TrainRecord:
        values: dict[str, Any] = {
            "samples": 16 * step,
            "tokens": 4096 * step,
            "loss": 3.0 + 1.0 / (3 * step),
            "budget_loss": 0.001,
            "grad_norm": 0.1 + 0.2,
            "lr": 3e-4,
            "seconds": 0.5,
            "tokens_per_second": 8192.0,
            "executed_flops": 6e9,
            "dense_flops": 8e9,
            "density": (0.5, 0.55),
            "skipped_update": False,
            "nonfinite": 0,
            "batch": 16,
        }
        return TrainRecord(step=step, attempt=attempt, **(values | changes))

    return build


@pytest.fixture(scope="session")
def valid_record() -> Callable[..., ValidRecord]:
    """Builds the record of a validation."""

    def build(step: int = 1, attempt: int = 1, **changes: Any) -> ValidRecord:
        values: dict[str, Any] = {"loss": 3.1, "bits_per_byte": 1.25, "density": (0.48, 0.52), "rows": 64}
        return ValidRecord(step=step, attempt=attempt, **(values | changes))

    return build


@pytest.fixture(scope="session")
def run_config() -> Config:
    """A small run of 20 steps, without TensorBoard."""
    return Config.model_validate(
        {
            "run": {"name": "small"},
            "model": {
                "num_layers": 4,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "vocab_size": 256,
            },
            "routing": {"first_dense": 2},
            "data": {"train": "shards", "tokenizer": "tok.model", "sequence_length": 256},
            "train": {"steps": 20, "global_batch": 16},
            "metrics": {"log_every": 5, "tensorboard": False},
        }
    )


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the package logs during a test."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger(ROOT)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def finished_files(
    run_config: Config,
    train_record: Callable[..., TrainRecord],
    valid_record: Callable[..., ValidRecord],
) -> dict[str, str]:
    """The files, by name, of a run that was stopped after step 12, resumed from step 10, and came to its end."""
    about = {"device": "NVIDIA H100 80GB HBM3", "world_size": 4, "routed_layers": [2, 3], "parameters": 5_243_000}
    records = [
        EventRecord(kind="start", step=0, attempt=1, message="started", values=about),
        *(train_record(step, 1) for step in range(1, 13)),
        valid_record(10, 1),
        EventRecord(kind="stop", step=12, attempt=1, message="asked to stop by SIGUSR1"),
        EventRecord(kind="resume", step=10, attempt=2, message="resumed", values=about),
        *(train_record(step, 2) for step in range(11, 21)),
        valid_record(20, 2, bits_per_byte=1.125),
        EventRecord(kind="alarm", step=15, attempt=2, message="layer 3 collapsed"),
        EventRecord(kind="end", step=20, attempt=2, message="all steps are done"),
    ]
    return {
        "metrics.jsonl": "".join(to_json(record) + "\n" for record in records),
        "config.yaml": yaml.safe_dump(run_config.model_dump(mode="json")),
        "routing_trace.json": json.dumps(small_trace()),
    }


@pytest.fixture
def finished_run(tmp_path: Path, finished_files: dict[str, str]) -> Path:
    """The directory of that run; the test may change it."""
    for name, content in finished_files.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.fixture(scope="session")
def finished_page(tmp_path_factory: pytest.TempPathFactory, finished_files: dict[str, str]) -> str:
    """The report of that run, as it is."""
    directory = tmp_path_factory.mktemp("finished")
    for name, content in finished_files.items():
        (directory / name).write_text(content)
    return write_report(directory).read_text(encoding="utf-8")


@pytest.fixture
def trace_json() -> dict[str, Any]:
    """A routing trace of one passage."""
    return small_trace()


def small_trace() -> dict[str, Any]:
    passage = {
        "tokens": ["The", " cat", " <b>", "\n"],
        "keep": [[1, 0, 0, 1], [1, 1, 0, 0]],
        "loss": [2.5, 0.25, None, None],
    }
    return {
        "format": 1,
        "step": 20,
        "num_layers": 4,
        "routed_layers": [2, 3],
        "density_target": 0.5,
        "passages": [passage],
    }
