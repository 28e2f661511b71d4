"""tools/bench.py quality: its runs are those of training, and its table is the arithmetic of its runs."""

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from megaroute.common.errors import ConfigError
from megaroute.config.load import load_config

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from benchmarks import jobs, quality

SMALL = {
    "model.hidden_size": 32,
    "model.vocab_size": 320,
    "model.ffn_hidden_size": 48,
    "data.sequence_length": 32,
    "data.lanes": 8,
    "optim.warmup_steps": 2,
    "train.global_batch": 4,
    "train.micro_batch": 2,
    "train.validate_samples": 8,
}
STEPS = 6
RIVALS = "dense-effective,skip,moe"


@pytest.fixture(scope="module")
def data(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    for name in ("train", "valid"):
        shutil.copytree(tiny_corpus / name, folder / name)
    shutil.copy(tiny_corpus / "tok.model", folder / "tokenizer.model")
    return folder


def parse(data: Path, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    where = ["--data", str(data), "--out", str(data / "out"), "--steps", str(STEPS), "--seeds", "2"]
    return parser.parse_args([*where, *small, *options])


@pytest.fixture(scope="module")
def rows(data: Path) -> dict[str, dict[str, Any]]:
    return {row["rival"]: row for row in quality.main(parse(data, "--rivals", RIVALS))}


def test_each_rival_has_its_row_and_the_best_comes_first(rows):
    assert set(rows) == set(RIVALS.split(","))
    bits = [row["bits_per_byte"] for row in rows.values()]
    assert bits == sorted(bits)
    assert {(row["seeds"], row["steps"], row["nonfinite"]) for row in rows.values()} == {(2, STEPS, 0)}


def test_bits_per_byte_and_flops_are_those_of_training_the_same_configuration(rows, data, start, advance):
    from megaroute.training.evaluate import validate

    found, flops = [], []
    for seed in (1, 2):
        here = {"data.train": data / "train", "data.valid": data / "valid", "data.tokenizer": data / "tokenizer.model"}
        keys = {**SMALL, **here, "train.steps": STEPS, "train.seed": seed, "data.seed": seed}
        keys["run.directory"] = data / "plain"
        parts = start(load_config(quality.RIVALS / "skip.yaml", [f"{key}={value}" for key, value in keys.items()]))
        results = advance(parts, STEPS)
        flops += [result.executed_flops / result.totals.tokens for result in results]
        found.append(validate(parts).bits_per_byte)
    assert rows["skip"]["bits_per_byte"] == pytest.approx(statistics.mean(found), rel=1e-12)
    assert rows["skip"]["error"] == pytest.approx(abs(found[0] - found[1]) / 2)
    assert rows["skip"]["mflops_per_token"] == pytest.approx(statistics.mean(flops) / 1e6)
    baseline = rows["dense-effective"]["mflops_per_token"]
    assert rows["skip"]["flops_ratio"] == pytest.approx(statistics.mean(flops) / 1e6 / baseline)


def test_differences_are_taken_between_runs_of_one_seed(data, rows):
    def runs(name: str, *bits: float) -> list[dict[str, Any]]:
        config = load_config(quality.RIVALS / f"{name}.yaml").model_dump(mode="json")
        plain = {"name": name, "density": [], "valid_density": [], "flops_per_token": 1e6, "nonfinite": 1, "steps": 1}
        return [{**plain, "bits_per_byte": value, "seconds": 1.0, "config": config} for value in bits]

    row = quality.summary(runs("wide-ffn", 2.1, 2.4, 2.5), runs("dense-effective", 2.0, 2.2, 2.4))
    assert row["difference"] == pytest.approx(0.4 / 3)
    assert row["difference_error"] == pytest.approx(statistics.stdev([0.1, 0.2, 0.1]) / 3**0.5)
    assert row["nonfinite"] == 3
    assert rows["dense-effective"]["difference"] == rows["dense-effective"]["difference_error"] == 0
    alone = quality.summary(runs("wide-ffn", 2.1), None)
    assert alone["difference"] is None and alone["error"] is None


def test_finished_runs_are_not_repeated_and_others_are(data, rows, capfd):
    files = sorted((data / "out" / "runs").glob("*.json"))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 6
    files[0].unlink()
    again = {row["rival"]: row for row in quality.main(parse(data, "--rivals", RIVALS))}
    assert [row["bits_per_byte"] for row in again.values()] == [row["bits_per_byte"] for row in rows.values()]
    assert {file for file in files if file.stat().st_mtime_ns != before[file]} == {files[0]}
    assert capfd.readouterr().err.count("bits per byte") == 1
    quality.main(parse(data, "--rivals", "skip", "--set", "routing.lr_factor=2"))
    assert len(list((data / "out" / "runs").glob("skip-*.json"))) == 4


def test_a_result_belongs_to_its_code_and_text(data, monkeypatch):
    overrides = [f"data.train={data / 'train'}", f"data.valid={data / 'valid'}"]
    config = load_config(quality.RIVALS / "skip.yaml", overrides)
    name = jobs.Job("skip", 1, config).file_name
    assert jobs.Job("skip", 1, config).file_name == name != jobs.Job("skip", 2, config).file_name
    other = config.model_copy(update={"data": config.data.model_copy(update={"train": config.data.valid})})
    monkeypatch.setattr(jobs, "dump_config", lambda config: "the same")
    assert jobs.Job("skip", 1, config).file_name != jobs.Job("skip", 1, other).file_name
    same = jobs.Job("skip", 1, config).file_name
    monkeypatch.setattr(jobs, "code_fingerprint", lambda: b"other code")
    assert jobs.Job("skip", 1, config).file_name != same


def test_unknown_rival_is_refused(data):
    with pytest.raises(ConfigError, match="--rivals: 'skipp' is not in .*dense-effective"):
        quality.main(parse(data, "--rivals", "skip,skipp"))


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--workers"])
def test_numbers_start_at_one(data, option, capsys):
    with pytest.raises(SystemExit):
        parse(data, option, "0")
    assert "'0' must be a whole number of at least 1" in capsys.readouterr().err
