"""A manifest and byte indexes for webdataset shards that came without them."""

import tarfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from megaroute.common.errors import DataError
from megaroute.common.files import sha256_file
from megaroute.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, write_manifest
from megaroute.data.members import document_members
from megaroute.data.shards import build_index, member_text
from megaroute.data.tokenizer import Tokenizer


def recover_manifest(
    folder: Path,
    *,
    text: str = "txt",
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> Manifest:
    """Index every tar of `folder`, in the order of names, and write its manifest; the tars are not touched.

    `text` is the member with the text: an extension such as `txt`, or `json.FIELD`.  With a tokenizer the tokens are
    counted.  Every document is read once; `progress` is told the bytes of each shard.  Raises DataError, with nothing
    written, for a tar that is damaged, compressed, or has a document without the text, and where a manifest exists
    (unless `overwrite`).
    """
    if (folder / MANIFEST_NAME).exists() and not overwrite:
        raise DataError(f"{folder / MANIFEST_NAME} exists and would be replaced; add --overwrite, or use --verify")
    indexes = {}
    for path in _tars(folder):
        index = _read_index(path)
        indexes[path] = (index, *_measure(path, index, text, tokenizer))
        progress(path.stat().st_size)
    try:
        entries = [_entry(path, *measured) for path, measured in indexes.items()]
        fingerprint = tokenizer.fingerprint if tokenizer else None
        manifest = Manifest(tokenizer=fingerprint, text=text, shards=tuple(entries))
        write_manifest(folder, manifest)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be written ({error.strerror}); indexes lie beside the shards, so copy "
            f"them to a folder that you can write to"
        ) from error
    return manifest


def _tars(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the folder that holds the shards")
    paths = sorted(folder.glob("*.tar"))
    packed = sorted(path.name for path in folder.iterdir() if path.name.endswith((".tar.gz", ".tgz", ".tar.zst")))
    if packed:
        raise DataError(
            f"{folder / packed[0]} is compressed, so no document in it can be read by itself; unpack it to .tar"
        )
    if not paths:
        raise DataError(f"{folder} holds no .tar file, so there is nothing to index; name the folder of the shards")
    return paths


def _read_index(path: Path) -> np.ndarray:
    try:
        index = build_index(path)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{path} is no tar file, or a damaged one ({error}); copy it again") from error
    if len(index) < 2:
        raise DataError(f"{path} holds no document; leave it out")
    if index[-1] > path.stat().st_size:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, its last document ends at {index[-1]}: it is cut off; "
            f"copy it again"
        )
    return index


def _measure(path: Path, index: np.ndarray, text: str, tokenizer: Tokenizer | None) -> tuple[int, int | None]:
    """UTF-8 bytes of the texts, and tokens with one end-of-document for each."""
    text_bytes = tokens = 0
    with open(path, "rb") as file:
        for document, (start, end) in enumerate(pairwise(index.tolist())):
            file.seek(start)
            try:
                words = member_text(document_members(file.read(end - start)), text)
            except (EOFError, tarfile.TarError, ValueError, KeyError) as error:
                raise DataError(
                    f"document {document} of {path} has no text at {text!r} ({type(error).__name__}: {error}); name "
                    f"the member that has it with --text-member, as in txt or json.text"
                ) from error
            text_bytes += len(words.encode())
            tokens += len(tokenizer.encode(words)) + 1 if tokenizer else 0
    return text_bytes, tokens if tokenizer else None


def _entry(path: Path, index: np.ndarray, text_bytes: int, tokens: int | None) -> ShardEntry:
    index_path = path.with_suffix(".index.npy")
    np.save(index_path, index)
    return ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        index=index_path.name,
        index_sha256=sha256_file(index_path),
        documents=len(index) - 1,
        text_bytes=text_bytes,
        tokens=tokens,
    )
