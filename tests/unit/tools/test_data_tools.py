"""tools/make_shards.py and tools/train_tokenizer.py as a user runs them."""

import gzip
import importlib.util
import json
import logging
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaroute.data.manifest import load_manifest
from megaroute.data.shards import ShardSet
from megaroute.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


def run_tool(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def call_tool(name: str, *arguments: object) -> int:
    """The tool's exit status, in this process: webdataset takes seconds to import."""
    spec = importlib.util.spec_from_file_location(f"tool_{Path(name).stem}", ROOT / "tools" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.main(list(map(str, arguments)))
    except SystemExit as stop:
        return stop.code
    finally:
        logging.getLogger("megaroute").handlers.clear()  # they write to what pytest closes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    arguments = ("--source", "stdlib", "--max-bytes", "300k", "--vocab-size", 600, "--out", "tok.model")
    done = run_tool("train_tokenizer.py", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.startswith("tok.model: 600 pieces, sha256 ")
    return folder / "tok.model"


def test_tokenizer_is_lossless_and_reproducible(model, tmp_path):
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tokenizer.encode("def f():\n\treturn  'é'\n")) == "def f():\n\treturn  'é'\n"
    arguments = ("--source", "stdlib", "--max-bytes", "300k", "--vocab-size", 600, "--out", "again.model")
    assert run_tool("train_tokenizer.py", *arguments, cwd=tmp_path).returncode == 0
    assert Tokenizer(tmp_path / "again.model").fingerprint == tokenizer.fingerprint


def test_library_becomes_two_folders(model, tmp_path):
    done = run_tool(
        "make_shards.py", "--source", "stdlib", "--max-bytes", "1M", "--shard-bytes", "256k", "--tokenizer", model,
        "--out", "train", "--valid-out", "valid", "--valid-fraction", 0.2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train, valid = load_manifest(tmp_path / "train"), load_manifest(tmp_path / "valid")
    assert len(train.shards) >= 3 and valid.documents >= 1
    assert 2**20 <= train.text_bytes + valid.text_bytes < 2**21
    assert train.tokenizer == Tokenizer(model).fingerprint and train.tokens > 100_000
    assert done.stdout.splitlines()[0] == (
        f"train: {len(train.shards)} shards, {train.documents:,} documents, "
        f"{train.text_bytes:,} bytes of text, {train.tokens:,} tokens"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "valid"]


def test_every_input_format_gives_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"a.txt": "first text\n", "b.txt": "second é\n"}
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items())
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    prints = set()
    for number, pattern in enumerate(("*.txt", "*.jsonl", "*.gz", "*.xz")):
        assert call_tool("make_shards.py", "--input", pattern, "--out", f"out{number}") == 0
        prints.add(load_manifest(tmp_path / f"out{number}").fingerprint)
    assert len(prints) == 1


def test_stored_tokens_change_nothing_else(model, tmp_path, monkeypatch):
    """The same documents in the same shards, so the same samples in the same order."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"é {i} " * (i % 9), "n": i}) + "\n" for i in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    common = ("--input", "c.jsonl", "--shard-bytes", 300, "--tokenizer", model, "--workers", 1, "--out")
    choices = {name: ("--tokenize", name) for name in ("beside", "only")} | {"plain": (), "all": ("--metadata", "all")}
    for name, options in choices.items():
        assert call_tool("make_shards.py", *common, name, *options) == 0
    manifests = {name: load_manifest(tmp_path / name) for name in choices}
    cuts = {name: [(s.documents, s.text_bytes, s.tokens) for s in m.shards] for name, m in manifests.items()}
    assert cuts["plain"] == cuts["beside"] == cuts["only"] == cuts["all"] and len(cuts["plain"]) > 3
    tokenizer = Tokenizer(model)
    sets = [ShardSet(tmp_path / name, manifests[name]) for name in choices]
    for shard, (documents, *_) in enumerate(cuts["plain"]):
        for document in range(documents):
            assert len({tuple(shards.encoded(shard, document, tokenizer)) for shards in sets}) == 1


@pytest.fixture
def folder_of_bad_input(tmp_path: Path) -> Path:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"te\n')
    (tmp_path / "good.txt").write_text("some words to read\n")
    (tmp_path / "taken").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("make_shards.py", "--input bad.jsonl --out out", "bad.jsonl:2 is not JSON"),
        ("make_shards.py", "--input none*.jsonl --out out", "no file matches 'none*.jsonl'"),
        (
            "make_shards.py",
            "--input good.txt --tokenizer bad.jsonl --out out",
            "--tokenizer: bad.jsonl is not a sentence",
        ),
        ("make_shards.py", "--input good.txt --out taken", "taken exists"),
        ("make_shards.py", "--input good.txt --out good.txt/out", "good.txt"),
        ("make_shards.py", "--input good.txt --out out --shard-bytes 5x", "'5x' is no positive number of bytes"),
        ("make_shards.py", "--input good.txt --out out --valid-fraction 0.1", "needs --valid-out"),
        ("make_shards.py", "--input good.txt --out out --valid-out v --valid-fraction 2", "between 0 and 1"),
        ("make_shards.py", "--input good.txt --source stdlib --out out", "not allowed with"),
        ("make_shards.py", "--input good.txt --out out --tokenize only", "--tokenize needs --tokenizer"),
        ("make_shards.py", "--input good.txt --out out --workers 0", "--workers must be 1 or more"),
        ("train_tokenizer.py", "--input good.txt --vocab-size 100 --out new.model", "--vocab-size 100 does not suit"),
        ("train_tokenizer.py", "--input bad.jsonl --vocab-size 400 --out new.model", "bad.jsonl:2 is not JSON"),
        ("train_tokenizer.py", "--input good.txt --vocab-size 400 --out good.txt", "good.txt exists"),
        ("train_tokenizer.py", "--input good.txt --vocab-size 400 --out none/tok", "its folder does not exist"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_writes_nothing(
    folder_of_bad_input, monkeypatch, capsys, tool, arguments, message
):
    monkeypatch.chdir(folder_of_bad_input)
    before = sorted(folder_of_bad_input.rglob("*"))
    assert call_tool(tool, *arguments.split()) == 2
    written = capsys.readouterr()
    last = written.err.splitlines()[-1]
    assert "error: " in last and message in last and written.out == ""
    assert sorted(folder_of_bad_input.rglob("*")) == before


def test_a_process_with_bad_input_prints_the_sentence_alone(folder_of_bad_input):
    """Nothing else reaches the terminal, not even from files that were open."""
    before = sorted(folder_of_bad_input.rglob("*"))
    done = run_tool("make_shards.py", "--input", "bad.jsonl", "--out", "out", cwd=folder_of_bad_input)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: bad.jsonl:2 is not JSON") and done.stderr.count("\n") == 1
    assert sorted(folder_of_bad_input.rglob("*")) == before
