"""A run directory that a test may change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copied_run(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")
