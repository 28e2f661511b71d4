"""Checks of the data before a run starts: nothing is loaded that takes long to import."""

from pathlib import Path

from megaroute.common.errors import DataError
from megaroute.common.files import sha256_file
from megaroute.config.data import DataConfig
from megaroute.data.manifest import Manifest, ShardEntry, load_manifest
from megaroute.data.shards import check_size, load_index
from megaroute.data.tokenizer import Tokenizer


def check_data(data: DataConfig, vocab_size: int) -> None:
    """Raise DataError, in one sentence with key and file, unless a run can read all its text.

    Shards and indexes of data.train and data.valid must be there with the size, and for data.verify = "full" the
    sha256, of their manifest; the tokenizer must load, be the one that the manifests name, if they do, and have at most
    `vocab_size` (model.vocab_size) pieces.
    """
    tokenizer = Tokenizer(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size: {vocab_size} rows are too few for the {tokenizer.vocab_size} pieces of "
            f"{data.tokenizer}; ids past the embedding cannot be looked up: use {tokenizer.vocab_size} or more, "
            f"or a smaller tokenizer"
        )
    for key, folder in data.folders.items():
        manifest = load_manifest(folder, key)
        check_same_tokenizer(tokenizer, manifest, folder, key)
        if data.on_damage == "skip" and key != "data.valid":
            continue  # what is damaged there is found, recorded and counted while training
        for entry in manifest.shards:
            _check_shard(folder, entry, key, full=data.verify == "full")


def check_same_tokenizer(tokenizer: Tokenizer, manifest: Manifest, folder: Path, key: str) -> None:
    """Raise DataError when the shards were counted with another tokenizer than the run's."""
    if manifest.tokenizer is not None and manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer: {tokenizer.path} has sha256 {tokenizer.fingerprint[:12]}, but {key} ({folder}) was "
            f"prepared with {manifest.tokenizer[:12]}, so its token counts would be wrong; use that tokenizer or "
            f"prepare the folder anew"
        )


def _check_shard(folder: Path, entry: ShardEntry, key: str, full: bool) -> None:
    check_size(folder, entry, key)
    load_index(folder, entry, key)
    if not full:
        return
    for name, expected in ((entry.name, entry.sha256), (entry.index, entry.index_sha256)):
        found = sha256_file(folder / name)
        if found != expected:
            raise DataError(
                f"{key}: {folder / name} has sha256 {found[:12]}, its manifest says {expected[:12]}; its content was "
                f"damaged or changed: copy it again or write the folder anew with tools/make_shards.py"
            )
