"""Loading runs no code from a file: crafted checkpoints that try are refused by what they name."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megaroute.checkpoint import integrity, layout
from megaroute.checkpoint.unpickle import read_common, read_metadata
from megaroute.common.errors import CheckpointError
from megaroute.config.load import load_config


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self):
        return os.mkdir, (str(self.sign),)


@pytest.fixture
def checkpoint(start, advance, save, tiny):
    parts = start(tiny())
    advance(parts, 1)
    return save(parts)


def resealed(path: Path) -> None:
    """Have the checksums of the files as they are now in the marker, as somebody who means it would."""
    files = {name: integrity.describe(path / name) for name in integrity.read_marker(path)}
    integrity.write_marker(path, 1, files)


def describe_with(attack: object, checkpoint: Path) -> bytes:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = attack
    return pickle.dumps(metadata)


def test_what_a_checkpoint_has_is_read(checkpoint):
    assert any(key.endswith("word_embeddings.weight") for key in read_metadata(checkpoint).state_dict_metadata)
    assert "optimizer" in read_common(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_crafted_file_is_refused_by_name_and_runs_nothing(checkpoint, start, tiny, tmp_path, name):
    sign = tmp_path / "it ran"
    if name == ".metadata":
        (checkpoint / name).write_bytes(describe_with(Attack(sign), checkpoint))
        pickle.loads((checkpoint / name).read_bytes())
        assert sign.exists()  # or the attack would be none
        sign.rmdir()
    else:
        torch.save({"optimizer": Attack(sign)}, checkpoint / name)
    resealed(checkpoint)
    for verify in ("full", "off"):
        with pytest.raises(CheckpointError, match=rf"{name} refers to posix.mkdir, .* so it is not loaded") as caught:
            start(tiny(f"checkpoint.verify={verify}"))
        assert "\n" not in str(caught.value)
    assert not sign.exists()


def test_an_entry_that_torch_would_unpickle_freely_is_refused(checkpoint, start, tiny):
    metadata = read_metadata(checkpoint)
    key = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    resealed(checkpoint)
    with pytest.raises(CheckpointError, match=r"refers to torch.distributed.checkpoint.metadata.BytesStorageMetadata"):
        start(tiny())


def test_a_crafted_tensor_is_refused(checkpoint, start, tiny, tmp_path):
    sign = tmp_path / "it ran"
    metadata = read_metadata(checkpoint)
    torch.save(Attack(sign), checkpoint / "crafted.distcp")
    for place in metadata.storage_data.values():
        place.relative_path, place.offset = "crafted.distcp", 0
        place.length = (checkpoint / "crafted.distcp").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    resealed(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be loaded into this model"):
        start(tiny())
    assert not sign.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"\.metadata cannot be read \(EOFError"),
        (b"\x80\x04garbage", r"\.metadata cannot be read \("),
        (pickle.dumps([1]), r"\.metadata cannot be read \(it holds a list, not a description of tensors"),
        (pickle.dumps(print), r"\.metadata refers to builtins.print"),
    ],
)
def test_what_is_no_description_is_refused_in_one_sentence(tmp_path, content, message):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_metadata(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_foreign_checkpoint_is_refused_in_one_sentence(tiny, start, tiny_file):
    folder = layout.directory(load_config(tiny_file, []).run_directory, 1)
    folder = tiny().run_directory / "checkpoints" / folder.name
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    assert start(tiny()).resumed_from is None  # not ours: it has no marker
    (folder / "complete.json").write_text('{"iteration": 1}')
    with pytest.raises(CheckpointError, match=r"complete.json has format None, this version of megaroute reads 3"):
        start(tiny())
