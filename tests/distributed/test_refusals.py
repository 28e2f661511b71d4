"""The whole command refuses what cannot work: exit status 2, one sentence, nothing written, before any rank starts."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def launch(config: Path, folder: Path, *words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """`megaroute launch CONFIG` with further words in `folder`, below which its run directory would be."""
    command = [sys.executable, "-m", "megaroute.cli", "launch", str(config), *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def processor_seconds() -> float:
    """Of the processes that ended so far; unlike the time on the wall it does not grow with what else is running."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def assert_refused(config: Path, folder: Path, words: list[str], *expected: str) -> None:
    """The sentences have the `expected` texts in them, came soon, and left `folder` as it was."""
    before, began = content(folder), processor_seconds()
    result = launch(config, folder, *words)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert all(line.startswith("megaroute: error: ") for line in result.stderr.splitlines()), result.stderr
    assert result.stderr.endswith("\n")
    for text in expected:
        assert text in result.stderr
    assert content(folder) == before
    assert processor_seconds() - began < 5


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train.lr=1"], "train.lr"),
        (["train.steps=many"], "train.steps"),
        (["parallel.tensor=2", "parallel.pipeline=2", "--nproc", "3"], "= 4 processes make one replica, but 3 were"),
        (["parallel.data=2", "--nproc", "3"], "parallel.data 2 = 2, but 3 processes"),
        (["parallel.pipeline=3"], "model.num_layers 4 % (parallel.pipeline 3"),
        (["parallel.tensor=3"], "model.num_attention_heads 4 % parallel.tensor 3 = 1"),
        (["train.precision=fp16"], "train.precision fp16"),
        (["data.train=nowhere"], "data.train: nowhere"),
        (["data.tokenizer=nowhere.model"], "data.tokenizer: nowhere.model"),
        (["model.vocab_size=200"], "model.vocab_size: 200 rows"),
        (["routing.density=0"], "routing.density is 0"),
        (["routing.router=mod", "routing.mod.predictor=false"], "routing.mod.predictor=true"),
        (["routing.dispatch.exchange=dp", "routing.unit=mlp"], "needs at least two replicas to exchange rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_by_its_key(tiny_file, tmp_path, words, expected):
    assert_refused(tiny_file, tmp_path, words, expected)


def test_run_directory_below_a_file_is_refused(tiny_file, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(tiny_file, tmp_path, ["run.directory=file/run"], "run.directory: file/run cannot be made")


def test_tokenizer_that_is_not_the_one_of_the_shards_is_refused(tiny_file, tiny_corpus, tmp_path):
    other = tiny_corpus / "other.model"
    assert_refused(tiny_file, tmp_path, [f"data.tokenizer={other}"], f"data.tokenizer: {other}")


@pytest.mark.parametrize("damage", ["missing", "one byte"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_missing_or_damaged_shard_is_refused_by_its_file(tiny_file, tiny_corpus, tmp_path, split, damage):
    shutil.copytree(tiny_corpus / split, tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    if damage == "missing":
        shard.unlink()
    else:
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    assert_refused(tiny_file, tmp_path, [f"data.{split}=shards"], f"error: data.{split}: ", f"shards/{shard.name} ")


@pytest.fixture(scope="module")
def untied(tiny_corpus) -> list[str]:
    """Overrides of a run on shards that do not say which tokenizer is theirs."""
    return [f"data.train={tiny_corpus / 'untied'}", "data.valid=null"]


@pytest.fixture(scope="module")
def launched(tiny_file, untied, tmp_path_factory) -> Path:
    """Folder below which a run of two steps was launched."""
    folder = tmp_path_factory.mktemp("launched")
    result = launch(tiny_file, folder, *untied, "train.steps=2")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def trained(launched, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(launched / "runs", tmp_path / "runs")
    return tmp_path


@pytest.mark.parametrize(
    "word, expected",
    [
        ("data.tokenizer={corpus}/other.model", "data.tokenizer: the checkpoint's data cursor was written for sha256"),
        ("data.train={corpus}/valid", "data.train: the checkpoint's data cursor was written for sha256"),
        ("model.hidden_size=64", "model.hidden_size: checkpoint"),
        ("routing.every=2", "routing.layers: checkpoint"),
        ("checkpoint.resume=false", "checkpoint.resume is false, but"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else "",
)
def test_what_the_checkpoint_cannot_continue_is_refused(trained, tiny_file, tiny_corpus, untied, word, expected):
    assert_refused(tiny_file, trained, [*untied, "train.steps=4", word.format(corpus=tiny_corpus)], expected)


def test_checkpoint_with_a_file_cut_short_is_refused(trained, tiny_file, untied):
    file = next((trained / "runs" / "tiny" / "checkpoints" / "step-00000002").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(tiny_file, trained, [*untied, "train.steps=4"], f"{file.name} cannot be read (it has")
