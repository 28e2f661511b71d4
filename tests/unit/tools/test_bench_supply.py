"""tools/bench.py supply: what its rows say, not how fast the machine is."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import supply
from benchmarks.corpus import make_corpus

pytestmark = pytest.mark.data

SMALL = ["--rows", "2", "--sequence-length", "64", "--step-ms", "1", "--steps", "3"]


def test_both_ways_bring_the_same_rows_and_are_told_apart(tmp_path):
    make_corpus(tmp_path, 400, 200_000)
    parser = argparse.ArgumentParser()
    supply.add_arguments(parser)
    read, broadcast = supply.main(parser.parse_args([*SMALL, "--corpus", str(tmp_path)]))
    assert (read["way"], broadcast["way"]) == ("every rank reads", "one reads and broadcasts")
    assert read["checksum"] == broadcast["checksum"] > 0
    assert min(read["wait_ms"], broadcast["wait_ms"], read["processor_ms"]) > 0
