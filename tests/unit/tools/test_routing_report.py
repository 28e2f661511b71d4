"""The tool that writes the token atlas: the way from a run to a page, and refusals."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import routing_report

from megaroute.config.load import load_config
from megaroute.launch.rundir import prepare_run_directory


@pytest.fixture
def keep_groups(monkeypatch):
    """The process group serves other tests too."""
    monkeypatch.setattr(routing_report.groups, "tear_down", lambda: None)
    monkeypatch.setattr(routing_report.distributed, "stop", lambda: None)
    monkeypatch.setattr(routing_report.log, "configure", lambda: None)


def test_run_becomes_a_page(start, advance, save, tiny_file, tmp_path, capsys, keep_groups):
    config = load_config(tiny_file, [f"run.directory={tmp_path / 'run'}", "train.steps=1"])
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 1)
    save(parts)
    (tmp_path / "text.txt").write_text("the router reads every token\nand decides\n" * 9)
    out = tmp_path / "atlas"
    assert routing_report.main([str(run), str(tmp_path / "text.txt"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'atlas.html'}\n"
    assert {"atlas.html", "types.csv", "frequency.csv", "positions.csv", "units.csv", "depth.csv"} <= {
        path.name for path in out.iterdir()
    }


@pytest.mark.parametrize(
    "text, out, message",
    [
        ("none.txt", "new", "none.txt is not a file"),
        ("text.txt", "text.txt", "is a file, so the tables have no place; name a folder"),
        ("text.txt", "new", "does not exist; name a run directory"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path, capsys, keep_groups, text, out, message):
    (tmp_path / "text.txt").write_text("x")
    words = [str(tmp_path / "run"), str(tmp_path / text), "--out", str(tmp_path / out)]
    assert routing_report.main(words) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
