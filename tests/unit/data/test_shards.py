import hashlib
import tarfile

import numpy as np
import pytest
import webdataset

from megaroute.common.errors import DataError
from megaroute.data import shards
from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.manifest import load_manifest
from megaroute.data.shards import ShardSet


def all_texts(shard_set: ShardSet) -> list[str]:
    counts = [shard.documents for shard in shard_set.manifest.shards]
    return [shard_set.read(shard, i) for shard, count in enumerate(counts) for i in range(count)]


def test_every_document_is_read_back_in_order(data, train_documents):
    shard_set = ShardSet(data.train, load_manifest(data.train))
    assert all_texts(shard_set) == [document.text for document in train_documents]
    last = len(shard_set.manifest.shards) - 1
    assert [shard_set.read(last, 0), shard_set.read(0, 2)] == [
        train_documents[-shard_set.manifest.shards[last].documents].text,
        train_documents[2].text,
    ]


def test_webdataset_itself_reads_the_shards(data, train_documents):
    """The folder is plain webdataset: other tools can read it without our index."""
    urls = sorted(str(path) for path in data.train.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).decode()
    assert [(sample["json"]["id"], sample["txt"]) for sample in samples] == [(d.id, d.text) for d in train_documents]


def test_more_shards_than_open_files(data, train_documents, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    shard_set = ShardSet(data.train, load_manifest(data.train))
    texts = [shard_set.read(shard, 0) for _ in range(2) for shard in range(len(shard_set.manifest.shards))]
    assert len(set(texts)) == len(shard_set.manifest.shards)
    assert len(shard_set._files) == 2


def test_the_same_documents_give_the_same_bytes(tmp_path, train_documents):
    digests = []
    for name in ("a", "b%d"):  # a per cent sign is no pattern
        build_shards(train_documents, tmp_path / name, shard_bytes=5000)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1] and len(digests[0]) > 5


def test_documents_of_any_shape(tmp_path):
    """Texts around the block size of tar, an odd id, an empty text."""
    texts = ["x" * n for n in (0, 1, 511, 512, 513, 1536)] + ["\x00", "é" * 300]
    documents = [Document(f"a/../.b.{i} \ud800", text) for i, text in enumerate(texts)]
    build_shards(documents, tmp_path / "out", shard_bytes=10**6)
    assert all_texts(ShardSet(tmp_path / "out", load_manifest(tmp_path / "out"))) == texts


def test_index_points_at_tar_headers(data):
    entry = load_manifest(data.train).shards[0]
    index = np.load(data.train / entry.index)
    with tarfile.open(data.train / entry.name) as tar:
        headers = [member.offset for member in tar if member.name.endswith(".json")]
    assert index[:-1].tolist() == headers


@pytest.mark.parametrize("offset", [10, 148, 512])
def test_a_document_whose_tar_is_damaged_is_named(copied_data, offset):
    """Name, header checksum, and invalid UTF-8 in the text; sizes are unchanged."""
    manifest = load_manifest(copied_data.train)
    entry = manifest.shards[0]
    index = np.load(copied_data.train / entry.index)
    text_header = int(index[2]) + 1024  # the text member follows the json member
    with open(copied_data.train / entry.name, "r+b") as file:
        file.seek(text_header + offset)
        file.write(b"\xff\xfe")
    shard_set = ShardSet(copied_data.train, manifest)
    shard_set.read(0, 1)
    with pytest.raises(DataError, match=r"data\.train: document 2 of .*shard-000000\.tar cannot be read"):
        shard_set.read(0, 2)
