"""Folders of shards from documents: written beside their final place and renamed, so that none is ever half there."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megaroute.common.errors import DataError
from megaroute.data.documents import Document, name_hash
from megaroute.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, write_manifest
from megaroute.data.shard_writer import ShardFolderWriter, Tokenize, token_type
from megaroute.data.tokenizer import Tokenizer


def build_shards(
    documents: Iterable[Document],
    out: Path,
    *,
    shard_bytes: int,
    tokenizer: Tokenizer | None = None,
    tokenize: Tokenize = "no",
    valid_out: Path | None = None,
    valid_fraction: float = 0.0,
    overwrite: bool = False,
) -> list[Manifest]:
    """Write `documents` as a folder of shards with its manifest; the same documents give the same bytes.

    With `valid_out`, the share `valid_fraction` of documents, drawn by a hash of their ids, goes there instead.
    `shard_bytes` is the UTF-8 text of a shard; with a tokenizer the manifest has token counts, and `tokenize` says
    whether the ids are stored too.  Returns the manifests of `out` and, if given, `valid_out`.  Raises DataError, and
    leaves everything as it was, when a folder exists (unless `overwrite`), cannot be written, or would be empty.
    """
    folders = [out.absolute()] if valid_out is None else [out.absolute(), valid_out.absolute()]
    check_targets(folders, overwrite)
    stored = token_type(tokenizer, tokenize)
    try:
        with ExitStack() as stack:
            drafts = [stack.enter_context(_draft_beside(folder)) for folder in folders]
            writers = [
                ShardFolderWriter(draft, shard_bytes, tokens=stored, text=tokenize != "only") for draft in drafts
            ]
            for writer in writers:
                stack.callback(writer.discard)
            split_documents(documents, writers, tokenizer, valid_fraction)
            manifests = [
                seal(writer.folder, writer.close(), folder, tokenizer, tokenize)
                for writer, folder in zip(writers, folders, strict=True)
            ]
            for draft, folder in zip(drafts, folders, strict=True):
                publish(draft, folder)
    except OSError as error:
        raise DataError(
            f"{error.filename or out} cannot be written ({error.strerror}), so no shards were made; "
            f"make room or choose another --out"
        ) from error
    return manifests


def check_targets(folders: Sequence[Path], overwrite: bool) -> None:
    """Raise DataError when folders overlap, or exist and may not be replaced."""
    for folder in folders:
        others = [other for other in folders if other is not folder]
        if any(folder == other or folder in other.parents for other in others):
            raise DataError(f"--out and --valid-out overlap at {folder}; give two separate folders")
        if not folder.exists():
            continue
        if not overwrite:
            raise DataError(f"{folder} exists and would be replaced; choose another folder or add --overwrite")
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_NAME).exists()):
            raise DataError(
                f"{folder} is no folder of shards, so --overwrite does not replace it; choose another folder"
            )


@contextmanager
def _draft_beside(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, on the same file system; on failure it and new parent folders are removed."""
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir()
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # not empty where another folder was already finished
            for parent in new_parents:
                parent.rmdir()
        raise


def split_documents(
    documents: Iterable[Document],
    writers: Sequence[ShardFolderWriter],
    tokenizer: Tokenizer | None,
    valid_fraction: float,
) -> None:
    """Write each document to the first writer, or to the second, if there is one, by a hash of its id."""
    valid_below = int(valid_fraction * 2**64) if len(writers) > 1 else 0
    for document in documents:
        writer = writers[name_hash(document.id, "valid") < valid_below]
        writer.write(document, tokenizer.encode(document.text) if tokenizer else None)


def seal(
    draft: Path, entries: Sequence[ShardEntry], folder: Path, tokenizer: Tokenizer | None, tokenize: Tokenize
) -> Manifest:
    """Write the manifest of the shards in `draft`.  Raises DataError, which names `folder`, when there are none."""
    if not entries:
        raise DataError(f"no document is left for {folder}, and a stream needs one; give more text or another share")
    manifest = Manifest(
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        token_type=token_type(tokenizer, tokenize),
        text=None if tokenize == "only" else "txt",
        shards=tuple(entries),
    )
    write_manifest(draft, manifest)
    return manifest


def publish(draft: Path, folder: Path) -> None:
    """Put `draft` at `folder`; what was there is removed last."""
    old = draft.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
