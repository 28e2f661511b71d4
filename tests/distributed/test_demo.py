"""What `make demo` runs, with few steps: killed, resumed, and every number that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY

KEYS = {
    *("layout", "steps", "parameters", "loss_first", "loss_last", "valid_bits_per_byte", "unigram_bits_per_byte"),
    *("density_target", "density_measured", "resumed_at_step", "resume_bit_equal", "seconds"),
}


@pytest.mark.slow
def test_demo_is_killed_resumed_and_sums_up_what_happened(tmp_path: Path):
    overrides = [
        f"run.directory={tmp_path}/run",
        f"data.train={tmp_path}/train",
        f"data.valid={tmp_path}/valid",
        f"data.tokenizer={tmp_path}/tokenizer.model",
        *("train.steps=40", "checkpoint.every=15", "train.validate_every=40", "optim.warmup_steps=5"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "demo.py"), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert summary["layout"] == "tp2 x pp2" and summary["steps"] == 40
    assert summary["resumed_at_step"] == 15 and summary["resume_bit_equal"] is True
    assert summary["loss_last"] < summary["loss_first"] - 0.5
    assert 0 <= summary["data_wait_share"] < 0.5
    assert (tmp_path / "run" / "report.html").exists()
    assert str(tmp_path / "run" / "report.html") in result.stdout.splitlines()[-1]
