"""tools/bench.py checksum: what its rows say, not how fast the machine is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench
import torch


def test_a_row_for_each_precision():
    arguments = bench.parse_arguments(["checksum", "--values", "100000", "--repeat", "2", "--device", "cpu"])
    threads = torch.get_num_threads()
    rows = bench.BENCHMARKS["checksum"].main(arguments)
    torch.set_num_threads(threads)
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["values"] == 100_000 and row["ms"] > 0
        assert row["environment"]["threads"] == 1
