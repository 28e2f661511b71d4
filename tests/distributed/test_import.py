"""An imported model is trained as a user does it: tool, launch, and launch again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY

pytest.importorskip("transformers", reason="imports want pip install 'megaroute[export]'")
pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
SETTINGS = [
    *("data.sequence_length=32", "data.lanes=8", "train.steps=4", "train.global_batch=8", "train.micro_batch=2"),
    *("optim.lr=1e-3", "optim.decay=constant", "run.device=cpu", "metrics.tensorboard=false", "metrics.report=false"),
]


def call(folder: Path, *words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


@pytest.mark.parametrize("kind", ["dense", "routed"])
def test_four_ranks_go_on_from_an_imported_model_like_one(corpus, tmp_path, kind):
    from foreign import save_foreign

    save_foreign(tmp_path / "llama", corpus / "tokenizer.model", vocab_size=520, num_hidden_layers=4)
    tool, steps = REPOSITORY / "tools" / "convert_checkpoint.py", ["routing.density_anneal.steps=4"]
    overrides = ["--as", "routed", "routing.first_dense=1", *steps] if kind == "routed" else []
    assert "24 tokens identical" in call(tmp_path, tool, "from-hf", "llama", "imported", *overrides)
    words = ["imported/config.yaml", f"data.train={corpus / 'train'}", f"data.valid={corpus / 'valid'}", *SETTINGS]
    call(tmp_path, "-m", "megaroute.cli", "pretrain", *words, "run.name=one")
    four = ["-m", "megaroute.cli", "launch", *words, *LAYOUT, "run.name=four"]
    call(tmp_path, *four, "train.steps=2")
    call(tmp_path, *four)  # from its own checkpoint, not from the imported one
    assert losses(tmp_path, "four") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    assert len(losses(tmp_path, "four")) == 4
    assert "logits differ by at most" in call(tmp_path, tool, "to-hf", "runs/four", "exported")
