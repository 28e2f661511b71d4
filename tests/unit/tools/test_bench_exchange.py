"""tools/bench.py exchange: what its rows say, not how fast the machine is."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from megaroute.common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import exchange

SHAPE = ["--hidden", "32", "--ffn", "48", "--rows", "8", "--repeat", "2"]


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    exchange.add_arguments(parser)
    return parser.parse_args([*SHAPE, *options])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return exchange.main(parse("--imbalances", "1,1.5,2"))


def test_rows_of_the_ranks_have_the_asked_mean_and_imbalance(rows):
    assert [row["rows"] for row in rows] == [[8, 8], [12, 4], [16, 0]]
    assert [row["imbalance"] for row in rows] == [1.0, 1.5, 2.0]
    assert [row["floor"] for row in rows] == pytest.approx([1, 8 / 12, 8 / 16])
    setting = exchange.Setting(4, 32, 48, "gelu", "fp32", "cpu", mean=10, repeat=1)
    assert setting.counts(1.25) == [12, 10, 9, 9]  # 12.5 rounds to the even number; the others share what is left


def test_bytes_and_flops_are_those_of_the_rows_moved(rows):
    moved = [0, 4, 8]
    assert [row["bytes_sent"] for row in rows] == [4 * each * 32 * 4 for each in moved]  # rows, 32 floats of 4 bytes
    row_flops = 3 * 2 * 2 * 32 * 48  # forward and backward, multiply and add, two matrices
    assert [row["flops_saved"] for row in rows] == [each * row_flops for each in moved]


def test_at_the_break_even_a_transfer_takes_as_long_as_it_saves(rows):
    for row in rows[1:]:
        saved = row["flops_saved"] / (1e9 * row["gflops_per_second"])
        assert row["bytes_sent"] / (1e9 * row["break_even_gb_per_second"]) == pytest.approx(saved)


def test_ratios_are_those_of_the_times(rows):
    for row in rows:
        for prefix in ("", "cpu_"):
            assert row[f"{prefix}ms_without"] > 0
            assert row[f"{prefix}ratio"] == row[f"{prefix}ms_with"] / row[f"{prefix}ms_without"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1"], "at least 2 ranks"),
        (["--imbalances", "1,2.5"], "at most 2 times the mean"),
        (["--rows", "0"], "must be at least 1"),
        (["--activation", "tanh"], "model.activation"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        exchange.main(parse(*options))


def test_an_imbalance_under_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--imbalances", "0.5")
    assert "at least 1" in capsys.readouterr().err
