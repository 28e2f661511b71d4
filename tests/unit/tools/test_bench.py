"""tools/bench.py: its command line and how it prints; what the benchmarks measure is tested beside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench
from benchmarks.common import as_table, environment, medians, milliseconds

from megaroute.platform import device

TOOLS = Path(__file__).parents[3] / "tools"
TINY = ["--hidden", "32", "--heads", "4", "--sequence", "16", "--batch", "1", "--repeat", "1", "--units", "mlp"]


def test_json_is_one_object_per_line(monkeypatch, capsys):
    rows = [{"density": 1.0, "environment": {"load": 0.5}}, {"density": 0.5, "environment": {"load": 0.5}}]
    monkeypatch.setattr(bench.BENCHMARKS["layer"], "main", lambda arguments: rows)
    assert bench.main(["layer", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert bench.main(["layer"]) == 0
    assert "density" in capsys.readouterr().out


QUIET = """
import sys
import bench
bench.BENCHMARKS["layer"].main = lambda _: [{"row": number} for number in range(9)]
sys.exit(bench.main(["layer", "--json"]))
"""


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", QUIET], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=TOOLS)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize("subcommand", bench.BENCHMARKS)
def test_every_subcommand_explains_itself(subcommand, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse_arguments([subcommand, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(TOOLS / "bench.py"), "layer", *TINY, "--densities", "0.5", "--json"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["unit"], row["mode"], row["density"]) for row in rows] == [
        ("mlp", "exact", 0.5),
        ("mlp", "capacity", 0.5),
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--hidden", "100", "--heads", "3"], "--hidden 100 % --heads 3 = 1, must be 0"),
        (["--repeat", "0"], "--repeat"),
        (["--sequence", "0"], "--sequence"),
    ],
    ids=["heads", "repeat", "sequence"],
)
def test_what_does_not_fit_is_refused_in_a_sentence(options, named, capsys):
    assert bench.main(["layer", *options]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--densities", "0"), ("--densities", "1.5"), ("--densities", "0.5,-1"), ("--units", "head"), ("--modes", "fast")],
)
def test_impossible_values_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse_arguments(["layer", option, value])
    assert stop.value.code == 2
    assert value in capsys.readouterr().err


def test_table_puts_what_is_the_same_everywhere_above(capsys):
    where = {"threads": 1, "load": 0.25}
    rows = [
        {"unit": "layer", "density": 1.0, "ms": 123.456, "environment": where, "rows": [1, 2]},
        {"unit": "layer", "density": 0.5, "ms": None, "environment": where, "rows": [3, 4]},
    ]
    lines = as_table(rows).splitlines()
    assert lines[:3] == ["unit: layer", "environment: threads 1, load 0.250", ""]
    assert [line.split() for line in lines[3:]] == [["density", "ms"], ["1.000", "123.5"], ["0.500", "-"]]
    assert as_table(rows[:1]).splitlines()[-1].split() == ["layer", "1.000", "123.5"]


def test_environment_says_where_and_when():
    found = environment(device.resolve("cpu"))
    assert found.keys() == {
        "date", "device", "cores", "threads", "load", "megaroute", "python", "torch", "megatron-core"
    }  # fmt: skip
    json.dumps(found)


def test_clock_counts_what_the_processor_does():
    cpu = device.resolve("cpu")
    short, long = (
        min(milliseconds(lambda count=count: sum(range(count)), cpu) for _ in range(3)) for count in (10_000, 3_000_000)
    )
    assert 0 <= short < long
    assert medians([(1.0, 5.0), (2.0, 4.0), (9.0, 0.0)]) == [2.0, 4.0]
