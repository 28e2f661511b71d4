"""A run directory that a test may change."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))


WORDS = ["router", "token", "layer", "time", "worth", "every", "reads", "decides"]


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


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Small files of each kind."""
    draw = random.Random(3)
    root = tmp_path_factory.mktemp("tasks")

    def words(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    made = {
        "piqa": lambda: {"query": f"{words(3)}\n", "choices": [words(2), words(2)], "gold": draw.randint(0, 1)},
        "winogrande": lambda: {"context_options": [words(2), words(2)], "continuation": words(2), "gold": 1},
        "webquestions_test": lambda: {"qText": words(3), "answers": [words(1), words(1)]},
        "blimp": lambda: {"sentence_good": words(3), "sentence_bad": words(3), "UID": "x"},
        "lambada": lambda: {"context": words(4), "continuation": words(1)},
    }
    for name, make in made.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(9)))
    return root
