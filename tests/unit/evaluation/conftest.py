"""A run directory that a test may change."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))


@pytest.fixture
def copied_run(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture(scope="module")
def scorer(trained_run: Path):
    """On process groups that tests of other modules may have ended."""
    from megaroute.evaluation.open import open_model

    return open_model(trained_run)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents shorter and longer than the context, one of them not of the corpus's language."""
    draw = random.Random(9)
    sentence = "the router reads every token and decides whether a layer is worth its time or not"
    sizes = [draw.randint(*bounds) for bounds in ((1, 4), (30, 90)) for _ in range(6)]
    texts = [" ".join(draw.choices(sentence.split(), k=size)) for size in sizes] + ["Größe: 12 × 3\n\tend."]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "body": "no"}) + "\n" for text in texts))
    return path
