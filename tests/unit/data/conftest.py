"""A small corpus, a tokenizer and two folders of shards, made once and not to be changed; `copied_data` may be."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaroute.config.data import DataConfig
from megaroute.data.build import build_shards
from megaroute.data.documents import Document, read_documents, stdlib_files
from megaroute.data.shards import ShardSet
from megaroute.data.tokenizer import Tokenizer
from megaroute.data.tokenizer_training import train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

WORDS = ["beautiful", "is", "better than", "ugly,", "simple\n", "complex", "", "42", "\t", "\u2581", "été", "名"]


def make_documents(count: int, seed: int) -> list[Document]:
    """Texts of 1 to 24 words each."""
    noise = np.random.Generator(np.random.Philox(key=seed))
    return [
        Document(f"{seed}-{i}", " ".join(noise.choice(WORDS, int(noise.integers(1, 25))).tolist()))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def library_documents() -> list[Document]:
    """About half a megabyte of Python source."""
    return list(read_documents(stdlib_files(), max_bytes=500_000))


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, library_documents: list[Document]) -> Path:
    """A BPE model of 1000 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_tokenizer(library_documents, path, vocab_size=1000)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def train_documents() -> list[Document]:
    return make_documents(150, seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, train_documents: list[Document]) -> DataConfig:
    """150 training and 40 validation documents in several shards, 8 lanes, rows of 33 tokens."""
    root = tmp_path_factory.mktemp("data")
    build_shards(train_documents, root / "train", shard_bytes=3000, tokenizer=tokenizer)
    build_shards(make_documents(40, seed=2), root / "valid", shard_bytes=3000, tokenizer=tokenizer)
    return DataConfig(
        train=root / "train", valid=root / "valid", tokenizer=tokenizer.path, sequence_length=32, lanes=8, seed=3
    )


@pytest.fixture
def copied_data(data: DataConfig, tmp_path: Path) -> DataConfig:
    """The same data in folders that a test may damage."""
    assert data.valid is not None
    shutil.copytree(data.train, tmp_path / "train")
    shutil.copytree(data.valid, tmp_path / "valid")
    shutil.copy(data.tokenizer, tmp_path / "tok.model")
    folders = {"train": tmp_path / "train", "valid": tmp_path / "valid", "tokenizer": tmp_path / "tok.model"}
    return data.model_copy(update=folders)


@pytest.fixture(autouse=True)
def shards_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test has opened is closed at its end, so that a file left open is a warning about the package."""
    opened: list[ShardSet] = []
    made = ShardSet.__init__

    def make(self: ShardSet, *arguments: Any, **settings: Any) -> None:
        made(self, *arguments, **settings)
        opened.append(self)

    monkeypatch.setattr(ShardSet, "__init__", make)
    yield
    for shards in opened:
        shards.close()
