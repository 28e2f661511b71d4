import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megaroute.common.errors import DataError
from megaroute.config.data import DataConfig
from megaroute.data.build import build_shards
from megaroute.data.tokenizer_training import train_tokenizer
from megaroute.data.verify import check_data

ROOT = Path(__file__).parents[3]


def flip_byte(path: Path) -> None:
    """Change the content without changing the size."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def test_good_data_passes(data):
    check_data(data, vocab_size=1000)
    check_data(data.model_copy(update={"valid": None, "verify": "size"}), vocab_size=1024)


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "bytes, its manifest says"), (Path.unlink, "is listed in the manifest but cannot be read")],
)
def test_missing_and_truncated_shards_are_named(copied_data, split, verify, damage, message):
    shard = getattr(copied_data, split) / "shard-000001.tar"
    damage(shard)
    with pytest.raises(DataError, match=rf"^data\.{split}: .*{shard}.* {message}"):
        check_data(copied_data.model_copy(update={"verify": verify}), 1000)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_full_verification_sees_a_flipped_bit(copied_data, split):
    shard = getattr(copied_data, split) / "shard-000001.tar"
    flip_byte(shard)
    check_data(copied_data.model_copy(update={"verify": "size"}), 1000)
    with pytest.raises(DataError, match=rf"^data\.{split}: {shard} has sha256"):
        check_data(copied_data, 1000)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: np.save(path, np.zeros(3, np.int64))])
def test_a_damaged_index_is_named(copied_data, damage):
    index = copied_data.train / "shard-000000.index.npy"
    damage(index) if damage is not truncate else os.truncate(index, index.stat().st_size - 8)
    with pytest.raises(DataError, match=rf"^data\.train: index {index}"):
        check_data(copied_data.model_copy(update={"verify": "size"}), 1000)


def test_an_index_of_right_shape_and_wrong_content_is_named(copied_data):
    path = copied_data.train / "shard-000000.index.npy"
    index = np.load(path)
    index[3] += 512
    np.save(path, index)
    with pytest.raises(DataError, match=rf"{path} has sha256"):
        check_data(copied_data, 1000)
    index[3] = index[2]
    np.save(path, index)
    with pytest.raises(DataError, match="does not fit its shard"):
        check_data(copied_data.model_copy(update={"verify": "size"}), 1000)


def test_another_tokenizer_is_refused(data: DataConfig, library_documents, tmp_path):
    train_tokenizer(library_documents[:10], tmp_path / "other.model", vocab_size=600)
    with pytest.raises(DataError, match=r"^data\.tokenizer: .*other\.model has sha256 .* data\.train .* prepared with"):
        check_data(data.model_copy(update={"tokenizer": tmp_path / "other.model"}), 1000)


def test_shards_made_without_a_tokenizer_take_any(data, train_documents, tmp_path):
    build_shards(train_documents, tmp_path / "plain", shard_bytes=10**6)
    check_data(data.model_copy(update={"train": tmp_path / "plain"}), 1000)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(data):
    with pytest.raises(DataError, match=r"^model\.vocab_size: 999 rows are too few for the 1000 pieces"):
        check_data(data, 999)


def test_missing_tokenizer_and_folders_are_named(data, tmp_path):
    for key in ("tokenizer", "train", "valid"):
        with pytest.raises(DataError, match=rf"^data\.{key}: {tmp_path}/none"):
            check_data(data.model_copy(update={key: tmp_path / "none"}), 1000)


def test_the_check_is_quick_to_import():
    """The launcher runs it; torch and webdataset take seconds."""
    code = "import sys, megaroute.data.verify; sys.exit(any(m in sys.modules for m in ('torch', 'webdataset')))"
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0
    assert time.perf_counter() - start < 10  # about 0.5 s on an idle machine
