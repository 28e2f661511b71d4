from typing import Any

import pytest

from megaroute.common.errors import DataError
from megaroute.data.build import build_shards
from megaroute.data.documents import Document
from megaroute.data.manifest import load_manifest
from megaroute.data.shards import ShardSet


def texts_of(folder) -> list[str]:
    shard_set = ShardSet(folder, load_manifest(folder))
    counts = [shard.documents for shard in shard_set.manifest.shards]
    return [shard_set.read(shard, i) for shard, count in enumerate(counts) for i in range(count)]


def tree(folder) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def documents(count: int, word: str = "text") -> list[Document]:
    return [Document(f"{word}-{i}", f"{word} {i}") for i in range(count)]


def test_the_split_is_a_partition_by_id(tmp_path):
    everything = documents(400)
    options: dict[str, Any] = {"shard_bytes": 500, "valid_fraction": 0.1}
    train, valid = build_shards(everything, tmp_path / "train", valid_out=tmp_path / "valid", **options)
    assert train.documents + valid.documents == 400
    assert 20 <= valid.documents <= 60
    held_out = set(texts_of(tmp_path / "valid"))
    assert texts_of(tmp_path / "train") == [d.text for d in everything if d.text not in held_out]
    build_shards(everything[::-1] + documents(50, "more"), tmp_path / "t2", valid_out=tmp_path / "v2", **options)
    assert {text for text in texts_of(tmp_path / "v2") if text.startswith("text")} == held_out


def test_without_a_tokenizer_tokens_are_unknown(tmp_path):
    (manifest,) = build_shards(documents(5), tmp_path / "out", shard_bytes=1000)
    assert (manifest.tokens, manifest.tokenizer) == (None, None)


def failing_documents(error: BaseException):
    yield from documents(100)
    raise error


@pytest.mark.parametrize("error", [DataError("bad line"), OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_everything_as_it_was(tmp_path, error):
    build_shards(documents(3), tmp_path / "old", shard_bytes=100)
    before = tree(tmp_path)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
    for out in (tmp_path / "new/deep/out", tmp_path / "old"):
        with pytest.raises(expected):
            build_shards(
                failing_documents(error),
                out,
                shard_bytes=50,
                valid_out=tmp_path / "new/valid",
                valid_fraction=0.5,
                overwrite=True,
            )
        assert tree(tmp_path) == before


def test_an_empty_side_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no document is left for .*out"):
        build_shards([], tmp_path / "out", shard_bytes=100)
    with pytest.raises(DataError, match=r"no document is left for .*valid"):
        build_shards(documents(2), tmp_path / "out", shard_bytes=100, valid_out=tmp_path / "valid", valid_fraction=1e-9)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    build_shards(documents(30), out, shard_bytes=50)
    with pytest.raises(DataError, match=r"exists .* --overwrite"):
        build_shards(documents(2, "new"), out, shard_bytes=50)
    assert texts_of(out) == [d.text for d in documents(30)]
    build_shards(documents(2, "new"), out, shard_bytes=50, overwrite=True)
    assert texts_of(out) == ["new 0", "new 1"]
    assert len(list(out.iterdir())) == 3 and list(tmp_path.iterdir()) == [out]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose")
    with pytest.raises(DataError, match="no folder of shards"):
        build_shards(documents(2), tmp_path, shard_bytes=50, overwrite=True)
    assert tree(tmp_path) == {"thesis.tex": b"do not lose"}


@pytest.mark.parametrize("valid", ["out", "out/valid", "."])
def test_overlapping_folders_are_refused(tmp_path, valid):
    with pytest.raises(DataError, match="overlap"):
        build_shards(documents(9), tmp_path / "out", shard_bytes=50, valid_out=tmp_path / valid, valid_fraction=0.5)
    assert not list(tmp_path.iterdir())
