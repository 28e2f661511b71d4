"""tools/bench.py stream: what its row says, not how fast the machine is."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import stream

pytestmark = pytest.mark.data

SMALL = ["--vocab-size", "400", "--max-bytes", "100000", "--sequence-length", "64", "--lanes", "8", "--turns", "1"]


@pytest.fixture(scope="module")
def row(tmp_path_factory) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    stream.add_arguments(parser)
    folder = tmp_path_factory.mktemp("bench")
    (found,) = stream.main(parser.parse_args([*SMALL, "--workers", "1", "2", "--corpus", str(folder)]))
    return found


def test_every_figure_is_there(row):
    json.dumps(row)
    assert row["share_of_encoder"] == pytest.approx(
        row["tokens_per_second_per_core"] / row["encoder_tokens_per_second"]
    )
    assert set(row["worker_scaling"]) == {"1", "2"} and min(row["worker_scaling"].values()) > 0
    assert min(row["resume_ms"], row["resume_ms_early"], row["resume_open_ms"]) > 0
    assert 0 < row["state_bytes_compressed"] < row["state_bytes"] < 1000


def test_a_resume_reads_a_document_of_each_lane_and_not_the_corpus(row):
    assert row["bytes_read_on_resume"] < 100_000 / row["lanes"] * 4
