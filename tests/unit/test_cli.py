"""The command line: what it parses, prints and returns."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megaroute import __version__, cli
from megaroute.common import pipes
from megaroute.common.errors import CheckpointError, ConfigError
from megaroute.config.load import load_config
from megaroute.launch.command import PREFLIGHT_DONE

REPOSITORY = Path(__file__).resolve().parents[2]
CPU_CONFIG = str(REPOSITORY / "pretrain_configs" / "debug" / "cpu.yaml")


def parsed(*words: str):
    return cli._parse(words)


def test_config_show_prints_what_loads_back_equal(capsys, tmp_path):
    assert cli.main(["config", "show", CPU_CONFIG, "train.seed=7"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "shown.yaml") == load_config(CPU_CONFIG, ["train.seed=7"])


def test_config_schema_is_json(capsys):
    assert cli.main(["config", "schema"]) == 0
    assert "train" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["config", "show", CPU_CONFIG, "train.lr=1"], "did you mean optim.lr?"),
        (["config", "show", "nowhere.yaml"], "configuration file nowhere.yaml cannot be read: No such file"),
        (["config", "show", CPU_CONFIG, "parallel.tensor=8"], "model.num_attention_heads 4 % parallel.tensor 8 = 4"),
        (["launch", CPU_CONFIG, "parallel.tensor=2", "--nproc", "3"], "launch 2 or 4"),
        (["launch", CPU_CONFIG, "train.precision=fp16"], "train.precision fp16 is not supported on the CPU"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("megaroute: error: ")
    assert shown.err.count("\n") == 1
    assert sentence in shown.err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_a_command_that_needs_no_run_directory(capsys, monkeypatch, tmp_path, tiny_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["launch", str(tiny_file), "--dry-run", "--nproc", "2", "run.name=trial"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--num_accelerators") + 1] == "2"
    assert words[-4:] == ["pretrain", str(tiny_file), "run.name=trial", "run.device=cpu"]
    assert not any(word.startswith(PREFLIGHT_DONE) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_a_run_would_refuse(capsys, tiny_file):
    assert cli.main(["launch", str(tiny_file), "--dry-run", "data.train=nowhere"]) == 2
    assert "data.train" in capsys.readouterr().err


def test_every_problem_has_its_line(capsys):
    assert cli.main(["config", "show", CPU_CONFIG, "parallel.tensor=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(line.startswith("megaroute: error: ") for line in lines)


@pytest.mark.parametrize("status, written", [(0, False), (130, True), (1, True)])
def test_a_run_that_did_not_finish_has_its_report_from_the_launcher(monkeypatch, tmp_path, capfd, status, written):
    from megaroute.launch import local
    from megaroute.training import preflight

    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    monkeypatch.setattr(local, "run", lambda *_: status)
    assert cli.main(["launch", CPU_CONFIG, f"run.directory={tmp_path}"]) == status
    assert (tmp_path / "report.html").exists() == written
    said = capfd.readouterr().err.splitlines()
    assert said[0].endswith(f"starting 1 process in {tmp_path}")
    assert [line.partition("report: ")[2] for line in said[1:]] == ([f"{tmp_path}/report.html"] if written else [])


def test_a_long_check_says_what_it_does(monkeypatch, tmp_path, capfd):
    from megaroute.common import log
    from megaroute.launch import local
    from megaroute.training import preflight

    monkeypatch.setattr(log, "LONG_S", 0.0)
    monkeypatch.setattr(preflight, "check", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(local, "run", lambda *_: 0)
    cli.main(["launch", CPU_CONFIG, f"run.directory={tmp_path}"])
    assert "checking the data (data.verify=full)" in capfd.readouterr().err


def test_overrides_may_stand_on_both_sides_of_options():
    arguments = parsed("launch", "a.yaml", "x.y=1", "--nproc", "2", "z.w=-3")
    assert arguments.overrides == ["x.y=1", "z.w=-3"]
    assert arguments.nproc == 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["config"],
        ["fly"],
        ["launch"],
        ["launch", "a.yaml", "--fast"],
        ["launch", "a.yaml", "--nproc", "0"],
        ["launch", "a.yaml", "--nproc", "2", "word"],
        ["report"],
        ["report", "runs/x", "--fast"],
        ["generate", "runs/x"],
        ["generate", "runs/x", "--prompt", "a", "--temperature", "-1"],
        ["generate", "runs/x", "--prompt", "a", "--temperature", "nan"],
        ["generate", "runs/x", "--prompt", "a", "--tokens", "many"],
    ],
    ids=" ".join,
)
def test_words_that_make_no_command_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "usage: megaroute" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["launch"], ["pretrain"], ["generate"], ["report"], ["config", "show"]], ids=str)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    example = " ".join(capsys.readouterr().out.split()).partition("example: megaroute ")[2]
    assert parsed(*shlex.split(example)).handler


@pytest.mark.parametrize(
    "option, value",
    [("--tokens", "many"), ("--tokens", "0"), ("--top-k", "-1"), ("--temperature", "hot"), ("--seed", "x")],
)
def test_a_value_that_is_none_is_refused_in_words(option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "runs/x", "--prompt", "a", f"{option}={value}"])
    assert f"argument {option}: '{value}' is not a " in capsys.readouterr().err


def test_help_keeps_the_case_of_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["config", "schema", "--help"])
    assert "Print the JSON schema" in capsys.readouterr().out


def test_generate_has_defaults_for_all_but_the_prompt():
    arguments = parsed("generate", "runs/x", "--prompt", "once")
    assert (arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed) == (64, 0.8, None, 0)


@pytest.mark.parametrize(
    "rank, error, expected",
    [
        ("0", ConfigError("a is b"), "megaroute: error: a is b\n"),
        ("3", ConfigError("a is b"), ""),
        ("3", CheckpointError("c is gone"), "megaroute: error: [rank 3] c is gone\n"),
    ],
)
def test_error_that_all_ranks_meet_is_said_once(monkeypatch, capsys, rank, error, expected):
    monkeypatch.setenv("RANK", rank)

    def refuse(*_):
        raise error

    monkeypatch.setattr(cli, "_write_report", refuse)
    assert cli.main(["report", "runs/x"]) == 2
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("module", ["megaroute", "megaroute.cli"])
def test_module_runs_as_a_command(module):
    command = [sys.executable, "-m", module]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert shown.stdout == f"megaroute {__version__}\n"
    failed = subprocess.run([*command, "config", "show", "x"], capture_output=True, text=True, cwd=REPOSITORY)
    assert failed.returncode == 2


def test_shown_config_keeps_the_order_of_sections(capsys):
    cli.main(["config", "show", CPU_CONFIG])
    sections = list(yaml.safe_load(capsys.readouterr().out))
    assert sections[:4] == ["run", "model", "routing", "parallel"]


@pytest.mark.parametrize("words", [["config", "schema"], ["config", "show", CPU_CONFIG]], ids=str)
def test_a_reader_that_goes_away_ends_the_command_quietly(words):
    command = [sys.executable, "-m", "megaroute", *words]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_another_pipe_that_breaks_is_news(monkeypatch):
    def broken(_):
        raise BrokenPipeError("the socket of a rank")

    monkeypatch.setattr(cli, "_write_report", broken)
    monkeypatch.setattr(pipes, "_reader_is_gone", lambda: False)
    with pytest.raises(BrokenPipeError, match="socket of a rank"):
        cli.main(["report", "runs/x"])
