"""A run directory with a model that has learned a little."""

import shutil
from pathlib import Path

import pytest

from megaroute.config.load import load_config
from megaroute.launch.rundir import prepare_run_directory


@pytest.fixture(scope="session")
def trained_run(start, advance, save, tiny_file, tmp_path_factory) -> Path:
    """The tiny model after 12 steps.  Not to be changed; `copied_run` may be."""
    root = tmp_path_factory.mktemp("trained")
    config = load_config(tiny_file, [f"run.directory={root / 'run'}", "train.steps=12"])
    run = prepare_run_directory(config)
    parts = start(config)
    advance(parts, 12)
    save(parts)
    return run


@pytest.fixture
def copied_run(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")
