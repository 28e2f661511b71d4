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


def measured(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    stream.add_arguments(parser)
    (found,) = stream.main(parser.parse_args([*SMALL, *arguments]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def row(folder) -> dict[str, Any]:
    return measured("--workers", "1", "2", "--corpus", folder)


def test_every_figure_is_there(row):
    json.dumps(row)
    assert row["share_of_encoder"] == pytest.approx(
        row["tokens_per_second_per_core"] / row["encoder_tokens_per_second"]
    )
    assert set(row["worker_scaling"]) == {"1", "2"} and min(row["worker_scaling"].values()) > 0
    assert min(row["resume_ms"], row["resume_open_ms"], *row["resume_ms_by_place"].values()) > 0
    assert list(row["resume_ms_by_place"]) == ["1%", "50%", "99%"]
    assert (row["shares"], row["padding"]) == ({"train": 1.0}, 0.0)
    assert 0 < row["state_bytes_compressed"] < row["state_bytes"] < 1000


def test_a_resume_reads_a_document_of_each_lane_and_not_the_corpus(row):
    assert row["bytes_read_on_resume"] < 100_000 / row["lanes"] * 4


def test_shares_of_a_mixture_and_padding_of_best_fit_are_measured(row, folder):
    mixture = ["--mixture", "train=0.7", "valid=0.3", "--packing", "best_fit"]
    found = measured("--workers", "1", "--corpus", folder, *mixture)
    assert set(found["shares"]) == {"train", "valid"} and sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert 0 < found["padding"] < 0.5
