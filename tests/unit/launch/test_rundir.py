"""The run directory's config.yaml and version.json."""

import json
import os

import pytest

import megaroute
from megaroute.common.errors import LaunchError
from megaroute.config.load import load_config
from megaroute.launch.rundir import prepare_run_directory, version_record

CONFIG = """
run: {name: trial, directory: "FOLDER/{name}"}
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 128, vocab_size: 256}
data: {train: t, tokenizer: t.model}
train: {steps: 10, global_batch: 8}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path / "runs")))
    return load_config(tmp_path / "run.yaml", ["train.steps=7"])


def test_run_directory_holds_the_resolved_config(config, tmp_path):
    directory = prepare_run_directory(config)
    assert directory == tmp_path / "runs" / "trial"
    assert load_config(directory / "config.yaml") == config
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml", "version.json"]


def test_version_tells_code_hosts_and_command(config):
    record = json.loads((prepare_run_directory(config) / "version.json").read_text())
    assert record["megaroute"] == megaroute.__version__
    assert record["torch"].startswith("2.")
    assert record["hosts"]
    assert record["argv"]
    assert record["started"].endswith("+00:00")


def test_commit_of_a_foreign_repository_is_not_taken(monkeypatch, tmp_path):
    os.system(f"cd {tmp_path} && git init -q && git -c user.name=a -c user.email=a commit -q --allow-empty -m x")
    package = tmp_path / "env" / "megaroute"
    package.mkdir(parents=True)
    monkeypatch.setattr(megaroute, "__file__", str(package / "__init__.py"))
    assert version_record()["commit"] is None


def test_commit_tells_when_files_differ(monkeypatch, tmp_path):
    package = tmp_path / "megaroute"
    package.mkdir()
    (package / "__init__.py").touch()
    git = f"cd {tmp_path} && git init -q && git add . && git -c user.name=a -c user.email=a commit -q -m x"
    assert os.system(git) == 0
    monkeypatch.setattr(megaroute, "__file__", str(package / "__init__.py"))
    clean = str(version_record()["commit"])
    assert len(clean) == 40
    (package / "__init__.py").write_text("x = 1\n")
    assert version_record()["commit"] == f"{clean}+changes"


def test_path_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(LaunchError, match="runs/trial cannot be written: .*run.directory"):
        prepare_run_directory(config)
