"""Checkpoints of any layout are exported: the tool compares logits, and the files are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY
from training import Ranks, write_config

pytest.importorskip("transformers", reason="exports want pip install 'megaroute[export]'")
pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(600)]

TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"
UNITS = {"layer": ["routing.unit=layer"], "separate": ["routing.unit=separate"], "dense": ["routing.router=dense"]}


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of four ranks, tensor 2 x pipeline 2 with sequence parallelism, after 4 steps."""
    folder = tmp_path_factory.mktemp("layouts")
    directories = {name: folder / name for name in UNITS}
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    overrides = {name: [*layout, *UNITS[name], f"run.directory={path}"] for name, path in directories.items()}
    config = write_config(folder, corpus)
    Ranks(config, folder).train(4, overrides, steps=4, save=UNITS)
    from megaroute.config.load import load_config
    from megaroute.launch.rundir import prepare_run_directory

    for name in UNITS:  # what a launch writes before its ranks start
        prepare_run_directory(load_config(config, overrides[name]))
    return directories


@pytest.mark.parametrize("name", UNITS)
def test_layout_of_four_ranks_is_exported_with_its_logits(runs, tmp_path, name):
    done = convert("to-hf", runs[name], tmp_path / "out", "--shard-gib", 1e-4)
    assert done.returncode == 0, done.stderr
    assert "logits differ by at most" in done.stdout and "24 tokens identical" in done.stdout
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
