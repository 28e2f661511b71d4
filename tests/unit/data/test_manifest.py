import pytest

from megaroute.common.errors import DataError
from megaroute.data.manifest import MANIFEST_NAME, Manifest, load_manifest, write_manifest


def test_round_trip_and_sums(data, train_documents, tokenizer, tmp_path):
    manifest = load_manifest(data.train)
    assert len(manifest.shards) > 3
    assert manifest.documents == len(train_documents)
    assert manifest.text_bytes == sum(len(document.text.encode()) for document in train_documents)
    assert manifest.tokens == sum(len(tokenizer.encode(document.text)) + 1 for document in train_documents)
    assert manifest.tokenizer == tokenizer.fingerprint
    write_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest


def change_shard(manifest: Manifest, **change: object) -> Manifest:
    first, *rest = manifest.shards
    return manifest.model_copy(update={"shards": (first.model_copy(update=change), *rest)})


def test_fingerprint_covers_what_decides_the_stream_and_nothing_else(data):
    manifest = load_manifest(data.train)
    for change in ({"name": "other.tar"}, {"tokens": None}, {"text_bytes": 1}):
        assert change_shard(manifest, **change).fingerprint == manifest.fingerprint
    swapped = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    fewer = manifest.model_copy(update={"shards": manifest.shards[:-1]})
    damaged = [change_shard(manifest, **change) for change in ({"sha256": "0" * 64}, {"index_sha256": "0" * 64})]
    prints = {m.fingerprint for m in (manifest, swapped, fewer, *damaged)}
    assert len(prints) == 5


def test_tokens_are_unknown_when_a_shard_was_not_counted(data):
    assert change_shard(load_manifest(data.train), tokens=None).tokens is None


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.valid: .*manifest\.json cannot be read \(No such file"):
        load_manifest(tmp_path / "none", "data.valid")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"megaroute-shards"', '"another-format"'),
        ('"version": 1', '"version": 2'),
        ('"documents": ', '"documents": -'),
        ('"sha256": "', '"sha256": "x'),
        ('"shard-000000.tar"', '"../shard-000000.tar"'),
        ('"text_bytes"', '"text_byte"'),
        ("}", ""),
    ],
)
def test_a_damaged_manifest_is_refused(data, tmp_path, old, new):
    text = (data.train / MANIFEST_NAME).read_text()
    assert old in text
    (tmp_path / MANIFEST_NAME).write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=r"manifest\.json is damaged at"):
        load_manifest(tmp_path)


def test_every_truncation_is_refused(data, tmp_path):
    raw = (data.train / MANIFEST_NAME).read_bytes().rstrip()
    for length in range(0, len(raw), 97):
        (tmp_path / MANIFEST_NAME).write_bytes(raw[:length])
        with pytest.raises(DataError, match="damaged"):
            load_manifest(tmp_path)


def test_no_shards_is_refused(tmp_path):
    write_manifest(tmp_path, Manifest(shards=()))
    with pytest.raises(DataError, match="lists no shard"):
        load_manifest(tmp_path)
