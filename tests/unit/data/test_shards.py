import errno
import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from megaroute.common.errors import DamagedShard, DataError
from megaroute.config.data import RemoteConfig
from megaroute.data import shards
from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.manifest import load_manifest
from megaroute.data.shards import ShardSet

pytestmark = pytest.mark.data


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
    assert len(shard_set._files) == 1  # and an index


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
    message = rf"data\.train: document 2 of .*shard-000000\.tar cannot be read at byte {index[2]} .*: copy it again"
    with pytest.raises(DamagedShard, match=message) as caught:
        shard_set.read(0, 2)
    place = (caught.value.shard, caught.value.document, caught.value.offset)
    assert place == (str(copied_data.train / entry.name), 2, index[2])
    assert vars(pickle.loads(pickle.dumps(caught.value))) == vars(caught.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "cut while open", "longer"])
def test_a_damaged_shard_is_named(copied_data, damage):
    manifest = load_manifest(copied_data.train)
    path = copied_data.train / manifest.shards[1].name
    shard_set = ShardSet(copied_data.train, manifest)
    if damage == "cut while open":
        shard_set.read(1, 0)
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (512 if damage == "longer" else -path.stat().st_size // 2))
    with pytest.raises(DamagedShard, match=str(path)) as caught:
        shard_set.read(1, manifest.shards[1].documents - 1)
    assert caught.value.shard == str(path)
    assert shard_set.read(0, 0)


class FailingReads:
    """Reads of files fail a number of times."""

    def __init__(self, monkeypatch, times: int, number: int) -> None:
        self.left, self._number, self._read = times, number, os.pread
        monkeypatch.setattr("os.pread", self.pread)

    def pread(self, *arguments):
        self.left -= 1
        if self.left >= 0:
            raise OSError(self._number, os.strerror(self._number))
        return self._read(*arguments)


QUICK = RemoteConfig(attempts=3, backoff_s=0.001)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_passing_errors_are_tried_again_in_place(data, train_documents, monkeypatch, number):
    shard_set = ShardSet(data.train, load_manifest(data.train), remote=QUICK)
    FailingReads(monkeypatch, 2, number)
    assert shard_set.read(0, 2) == train_documents[2].text


@pytest.mark.parametrize(
    ("number", "kind", "reads"),
    [(errno.EIO, DamagedShard, 3), (errno.ESTALE, DataError, 3), (errno.EACCES, DataError, 1)],
)
def test_lasting_errors_are_named(data, monkeypatch, number, kind, reads):
    shard_set = ShardSet(data.train, load_manifest(data.train), remote=QUICK)
    failing = FailingReads(monkeypatch, 99, number)
    with pytest.raises(DataError, match=rf"document 2 of .*{os.strerror(number)}") as caught:
        shard_set.read(0, 2)
    assert type(caught.value) is kind and 99 - failing.left == reads


@pytest.mark.parametrize("tokenize", ["beside", "only"])
def test_stored_tokens_are_what_the_tokenizer_gives(tmp_path, train_documents, tokenizer, tokenize):
    texts = ["", "\u2581 x", "\U0001f600 é", *(document.text for document in train_documents[:20])]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    build_shards(documents, tmp_path / "out", shard_bytes=500, tokenizer=tokenizer, tokenize=tokenize)
    build_shards(documents, tmp_path / "text", shard_bytes=500)
    manifest = load_manifest(tmp_path / "out")
    stored, plain = ShardSet(tmp_path / "out", manifest), ShardSet(tmp_path / "text", load_manifest(tmp_path / "text"))
    places = [(shard, i) for shard, entry in enumerate(manifest.shards) for i in range(entry.documents)]
    assert len(places) == len(texts) and manifest.token_type == "uint16"
    for place, text in zip(places, texts, strict=True):
        assert stored.read_tokens(*place).tolist() == tokenizer.encode(text)
        assert stored.encoded(*place, tokenizer).tolist() == [*tokenizer.encode(text), tokenizer.eod]
        assert np.array_equal(stored.encoded(*place, tokenizer), plain.encoded(*place, tokenizer))
        assert stored.encoded(*place, tokenizer).dtype == np.int32
    if tokenize == "beside":
        assert all_texts(stored) == texts
    else:
        with pytest.raises(DataError, match=r"token ids without the texts.*--tokenize beside"):
            stored.read(0, 0)


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large:
        vocab_size, fingerprint, eod = 70_000, "a" * 64, 1

        @staticmethod
        def encode(text: str) -> list[int]:
            return [69_999, 5]

    build_shards([Document("a", "x")], tmp_path / "out", shard_bytes=500, tokenizer=Large(), tokenize="only")
    manifest = load_manifest(tmp_path / "out")
    assert manifest.token_type == "uint32"
    assert ShardSet(tmp_path / "out", manifest).read_tokens(0, 0).tolist() == [69_999, 5]
