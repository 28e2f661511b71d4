"""Writing documents as tar shards with a byte index; the same documents give the same bytes."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from megaroute.common.files import sha256_file
from megaroute.data.formats import Document
from megaroute.data.manifest import TOKEN_MEMBERS, ShardEntry, TokenType
from megaroute.data.shards import build_index
from megaroute.data.tokenizer import Tokenizer

Tokenize = Literal["no", "beside", "only"]
MAX_DOCUMENTS = 100_000  # of one shard: keeps its index under a megabyte


def token_type(tokenizer: Tokenizer | None, tokenize: Tokenize) -> TokenType | None:
    """The smallest type that holds every id of `tokenizer`, or None when tokens are not stored."""
    if tokenizer is None or tokenize == "no":
        return None
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


class ShardFolderWriter:
    """Writes documents into numbered shards of a folder.

    The bytes written depend on the documents, on `shard_bytes` (of texts and ids in a shard), and on `part` alone:
    names of shards and keys of documents begin with the part's number, if there is one, so that parts can be written
    apart.  Which documents share a shard does not depend on what else is stored of them.
    `tokens` is the type of token ids stored beside the text, or instead of it without `text`.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int,
        *,
        part: int | None = None,
        tokens: TokenType | None = None,
        text: bool = True,
    ) -> None:
        from webdataset.writer import ShardWriter

        self.folder = folder
        self._entries: list[ShardEntry] = []
        self._documents = self._text_bytes = self._id_bytes = self._tokens = 0
        self._counted = True
        self._type, self._text = tokens, text
        self._part = "" if part is None else f"{part:05d}-"
        pattern = str(folder.resolve()).replace("%", "%%") + f"/shard-{self._part}%06d.tar"
        # Where shards are cut decides the order of samples.  It may not depend on what else is stored of a document, so
        # webdataset's own bound, which counts all members, is out of the way.
        self._shard_bytes = shard_bytes
        self._writer = ShardWriter(pattern, maxcount=2**62, maxsize=2**62, post=self._finish_shard, verbose=0, mtime=0)

    def write(self, document: Document, ids: Sequence[int] | None = None) -> None:
        """Append one document; `ids` are its tokens without end-of-document, if known."""
        text = document.text.encode()
        members = {"__key__": f"{self._part}{self._writer.total:09d}", "json": _description(document)}
        if self._text:
            members["txt"] = text
        if self._type is not None:
            assert ids is not None, "tokens are stored, so each document needs them"
            members[TOKEN_MEMBERS[self._type]] = np.asarray(ids, dtype=np.dtype(self._type).newbyteorder("<")).tobytes()
        if self._text_bytes + self._id_bytes >= self._shard_bytes or self._documents >= MAX_DOCUMENTS:
            self._writer.next_stream()
        self._writer.write(members)
        self._documents += 1
        self._text_bytes += len(text)
        self._id_bytes += len(_description(Document(document.id, "")))
        self._tokens += 0 if ids is None else len(ids) + 1
        self._counted = ids is not None

    def close(self) -> list[ShardEntry]:
        """Finish the last shard; the entries of all shards."""
        self._writer.finish()
        return self._entries

    def discard(self) -> None:
        """Close a shard that is still open, for a folder that will be removed; nothing happens after close()."""
        self._writer.post = None
        with suppress(OSError):
            self._writer.finish()

    def _finish_shard(self, name: str) -> None:
        if not self._documents:  # closed without a document
            os.unlink(name)
            return
        path = Path(name)
        tokens = self._tokens if self._counted else None
        self._entries.append(index_shard(path, self._documents, self._text_bytes, tokens))
        self._documents = self._text_bytes = self._id_bytes = self._tokens = 0


def index_shard(path: Path, documents: int, text_bytes: int, tokens: int | None) -> ShardEntry:
    """Write the index of a tar beside it; the shard's entry in the manifest."""
    index_path = path.with_suffix(".index.npy")
    index = build_index(path)
    assert len(index) == documents + 1, f"{path}: {len(index) - 1} documents found, {documents} written"
    np.save(index_path, index)
    return ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        index=index_path.name,
        index_sha256=sha256_file(index_path),
        documents=documents,
        text_bytes=text_bytes,
        tokens=tokens,
    )


def _description(document: Document) -> bytes:
    record = {"id": document.id, **({"metadata": dict(document.metadata)} if document.metadata else {})}
    return json.dumps(record, default=str).encode()  # Parquet has dates and the like
