"""Numbers as people read them."""

import math

import pytest

from megaroute.metrics.formats import duration, percent, si


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0, "", "0"),
        (12.345, "", "12.3"),
        (999.4, "", "999"),
        (999.6, "", "1k"),
        (12_345, "", "12.3k"),
        (999_600, "", "1M"),
        (5.2e21, "FLOP", "5.2e+03 EFLOP"),
        (3.12e14, "FLOP/s", "312 TFLOP/s"),
        (7, "FLOP", "7 FLOP"),
        (-2500, "", "-2.5k"),
        (math.nan, "", "nan"),
        (math.inf, "", "inf"),
    ],
)
def test_si(value, unit, text):
    assert si(value, unit) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (92, "1m 32s"),
        (3599.6, "1h 00m"),
        (18_180, "5h 03m"),
        (198_000, "2d 07h"),
        (-3, "0s"),
        (math.inf, "unknown"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert percent(0.41267) == "41.3 %"
