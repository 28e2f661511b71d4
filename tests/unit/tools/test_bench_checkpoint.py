"""tools/bench.py checkpoint: what its rows say, not how fast the machine is."""

import argparse
import sys
from pathlib import Path

import pytest

from megaroute.common.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import checkpoint


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    return parser.parse_args(["--hidden", "32", "--layers", "2", "--repeat", "1", *options])


def test_rows_have_the_figures_of_both_kinds_of_save(tmp_path):
    (row,) = checkpoint.main(parse("--ranks", "2", "--folder", str(tmp_path)))
    assert (row["ranks"], row["precision"]) == (2, "bf16")
    # Two bytes of a weight, and four each of its copy and its two moments; names and padding of the files beside.
    assert 14 * row["parameters"] < row["bytes"] < 14 * row["parameters"] + 1_000_000
    assert 0 < row["stall_seconds"] < row["beside_seconds"] and row["load_seconds"] > 0
    assert row["stall_share"] == row["stall_seconds"] / row["save_seconds"]
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError):
        checkpoint.main(parse("--hidden", "-1"))
