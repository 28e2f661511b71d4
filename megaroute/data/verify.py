"""Checks of the data before a run starts: nothing is loaded that takes long to import."""

from pathlib import Path

from megaroute.common.errors import DamagedShard, DataError
from megaroute.common.files import sha256_file
from megaroute.config.data import DataConfig, is_remote
from megaroute.data.manifest import Manifest, ShardEntry, load_manifest
from megaroute.data.shards import load_index
from megaroute.data.store import REMEDY, check_size
from megaroute.data.tokenizer import Tokenizer


def check_data(data: DataConfig, vocab_size: int) -> None:
    """Raise DataError, in one sentence with key and file, unless a run can read all its text.

    Shards and indexes of data.train and data.valid must be there with the size, and for data.verify = "full" the
    sha256, of their manifest, except in a remote folder, whose files are checked when they are fetched; the tokenizer
    must load, be the one that the manifests name, if they do, and have at most
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
        manifest = load_manifest(folder, key, data.remote)
        check_same_tokenizer(tokenizer, manifest, folder, key)
        # What may be skipped is found, recorded and counted while training.
        skipped = is_remote(folder) or (data.on_damage == "skip" and key != "data.valid")
        for entry in () if skipped else manifest.shards:
            check_shard(Path(folder), entry, key, full=data.verify == "full")


def check_same_tokenizer(tokenizer: Tokenizer, manifest: Manifest, folder: str | Path, key: str) -> None:
    """Raise DataError when the shards were counted with another tokenizer than the run's."""
    if manifest.tokenizer is not None and manifest.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"data.tokenizer: {tokenizer.path} has sha256 {tokenizer.fingerprint[:12]}, but {key} ({folder}) was "
            f"prepared with {manifest.tokenizer[:12]}, so its token counts would be wrong; use that tokenizer or "
            f"prepare the folder anew"
        )


def check_shard(folder: Path, entry: ShardEntry, key: str, full: bool) -> None:
    """Raise DamagedShard unless shard and index are as the manifest says, with `full` byte for byte."""
    check_size(folder, entry, key)
    load_index(folder, entry, key)
    if not full:
        return
    for name, expected in ((entry.name, entry.sha256), (entry.index, entry.index_sha256)):
        found = sha256_file(folder / name)
        if found != expected:
            raise DamagedShard(
                f"{key}: {folder / name} has sha256 {found[:12]}, its manifest says {expected[:12]}; its content was "
                f"damaged or changed: {REMEDY}",
                shard=str(folder / entry.name),
            )
