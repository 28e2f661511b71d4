"""tools/bench.py decode: cached steps of a routed model beside dense ones."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="decoding wants pip install 'megaroute[export]'")
sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench

from megaroute.common.errors import ConfigError

TINY = ["decode", "--hidden", "32", "--heads", "4", "--layers", "4", "--vocab", "64", "--context", "40", "--steps", "6"]


def rows(*words: str) -> list[dict]:
    return bench.BENCHMARKS["decode"].main(bench.parse_arguments([*TINY, "--repeat", "1", *words]))


def test_routed_model_has_the_cache_of_the_deep_one_and_skips_its_share():
    found = {(row["batch"], row["model"]): row for row in rows("--batches", "1", "3", "--kv-heads", "2")}
    assert len(found) == 6
    for batch in (1, 3):
        deep, effective, skip = (found[batch, name] for name in ("dense-deep", "dense-effective", "skip"))
        # Keys and values of 46 tokens, 2 heads of width 8, float32.
        assert deep["kv_bytes"] == skip["kv_bytes"] == 2 * 4 * batch * 46 * 2 * 8 * 4
        assert effective["kv_bytes"] == deep["kv_bytes"] // 2
        assert deep["density"] == 1.0 and 0.1 < skip["density"] < 0.9
        assert deep["ratio_to_dense_deep"] == effective["ratio_to_dense_effective"] == 1.0
        assert skip["ratio_to_dense_deep"] == skip["ms"] / deep["ms"]


def test_cost_without_a_dense_model_of_it_is_refused():
    with pytest.raises(ConfigError, match="--first-dense 1 .* = 2.5 layers per token"):
        rows("--first-dense", "1")
