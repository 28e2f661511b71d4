"""tools/bench.py: what its table says, not how fast the machine is."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SHAPE = ["--hidden", "32", "--heads", "4", "--kv-heads", "2", "--ffn", "48", "--sequence", "40", "--batch", "2"]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool_bench", ROOT / "tools" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(bench: ModuleType) -> Any:
    return bench.layer_config(bench.parse_arguments(["layer", *SHAPE]))


@pytest.fixture(scope="module")
def report(bench: ModuleType, config: Any, one_process: None) -> Any:
    return bench.measure(config, batch=2, densities=[1.0, 0.5, 0.01], repeat=3)


def test_floor_is_that_of_the_formula(bench, config):
    import torch

    keep_SB = torch.zeros(40, 2, dtype=torch.bool)
    keep_SB[0, 0] = keep_SB[9, 1] = True
    key_value = 2 * 32 * 2 * 2 * 8
    executed = 2 * 32 * 32 * 2 + 3 * 2 * 32 * 48
    pair = 4 * 4 * 8
    assert bench.layer_flops(config.model, keep_SB) == 80 * key_value + 2 * executed + (1 + 10) * pair


def test_each_row_executes_its_density(report):
    assert [row.executed for row in report.rows] == [80, 40, 1]
    floors = [row.floor for row in report.rows]
    assert floors == sorted(floors, reverse=True) and floors[0] == 1
    assert 2 * 32 * 2 * 2 * 8 / (2 * 32 * 2 * 2 * 8 + 2 * 32 * 32 * 2 + 6 * 32 * 48 + 20.5 * 128) < floors[-1] < 0.25


def test_ratios_are_those_of_the_printed_times(report):
    assert report.dense_ms > 0
    for row in report.rows:
        assert row.ms > 0
        assert row.ratio == pytest.approx(row.ms / report.dense_ms)
        assert row.ratio_to_floor == pytest.approx(row.ratio / row.floor)
        assert row.computed > row.floor  # the router, and pairs that a block masks out


def test_table_has_a_line_for_the_dense_layer_and_each_density(bench, report):
    lines = bench.as_table(report).splitlines()
    header = next(index for index, line in enumerate(lines) if line.split()[:1] == ["density"])
    assert lines[header].split() == ["density", "executed", "ms", "ratio", "floor", "computed", "ratio/floor"]
    table = [line.split() for line in lines[header + 1 :]]
    assert [line[0] for line in table] == ["dense", "1", "0.5", "0.01"]
    assert [line[5] for line in table[1:]] == [f"{row.computed:.3f}" for row in report.rows]


def test_json_says_what_was_measured_where_and_when(bench, report):
    found = json.loads(bench.as_json(report))
    assert found.keys() == {
        "benchmark", "date", "hardware", "threads", "versions", "shape", "repeat", "dense_ms", "rows"
    }  # fmt: skip
    assert found["hardware"].keys() == {"cpu", "cores", "load"}
    assert found["versions"].keys() == {"megaroute", "python", "torch", "megatron-core"}
    assert found["shape"] == {"hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "sequence": 40, "batch": 2}
    assert found["rows"][1]["density"] == 0.5
    assert found["rows"][1]["ratio_to_floor"] == report.rows[1].ratio_to_floor


@pytest.mark.parametrize("densities", ["0", "1.5", "0.5,-1", "half"])
def test_impossible_densities_are_refused(bench, densities, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse_arguments(["layer", "--densities", densities])
    assert stop.value.code == 2
    assert densities in capsys.readouterr().err


def test_impossible_shape_is_refused_in_a_sentence(bench, capsys):
    assert bench.main(["layer", "--hidden", "100", "--heads", "3"]) == 2
    assert "hidden_size 100 % num_attention_heads 3 = 1, must be 0" in capsys.readouterr().err
