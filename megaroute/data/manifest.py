"""What a folder of shards holds: `manifest.json` lists its shards with sizes and checksums, in reading order."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from megaroute.common.errors import DataError
from megaroute.common.files import atomic_write
from megaroute.config.data import RemoteConfig, is_remote
from megaroute.data.remote import fetch, location

MANIFEST_NAME = "manifest.json"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TokenType = Literal["uint16", "uint32"]
TOKEN_MEMBERS: dict[str, str] = {"uint16": "u16", "uint32": "u32"}
"""Extension of the member that holds a document's token ids, little-endian."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class ShardEntry(BaseModel):
    """One tar shard and the index beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: FileName
    """File name of the tar, inside the manifest's folder."""
    bytes: PositiveInt
    """Size of the tar."""
    sha256: Sha256
    """Checksum of the tar."""
    index: FileName
    """File name of the index: npy, int64 [documents + 1], the byte offset of each document and the end of the last."""
    index_sha256: Sha256
    """Checksum of the index."""
    documents: PositiveInt
    """Number of documents."""
    text_bytes: NonNegativeInt
    """UTF-8 bytes of all texts."""
    tokens: NonNegativeInt | None = None
    """Tokens of all texts, with one end-of-document token each; not known without a tokenizer."""


class Manifest(BaseModel):
    """The content of a folder of shards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal["megaroute-shards"] = "megaroute-shards"
    """Marks the file as ours."""
    version: Literal[1] = 1
    """Version of this format."""
    tokenizer: Sha256 | None = None
    """Checksum of the tokenizer that counted the tokens, if one did."""
    token_type: TokenType | None = None
    """Type of the token ids that are stored with each document, without end-of-document; None when they are not."""
    text: str | None = "txt"
    """Member with the text: an extension, `json.FIELD`, or None when there are token ids only."""
    shards: tuple[ShardEntry, ...]
    """Shards in reading order: a shard's number is its place here."""

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def tokens(self) -> int | None:
        """Tokens of all shards, one end-of-document token each included, or None when they were not counted."""
        counts = [shard.tokens for shard in self.shards if shard.tokens is not None]
        return sum(counts) if len(counts) == len(self.shards) else None

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of what decides the stream: order and content of the shards, not their names."""
        content = [[shard.sha256, shard.index_sha256, shard.documents] for shard in self.shards]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_manifest(folder: str | Path, key: str = "data.train", remote: RemoteConfig | None = None) -> Manifest:
    """Read `folder`/manifest.json; `key` is the setting that named the folder, for the error text.

    Raises DataError when the folder or the manifest is missing, out of reach, malformed, or lists no shard.
    """
    path = location(folder, MANIFEST_NAME)
    remedy = "write the folder with tools/make_shards.py, or copy it again"
    try:
        raw = fetch(path, remote or RemoteConfig(), key) if is_remote(folder) else Path(path).read_bytes()
        manifest = Manifest.model_validate_json(raw)
    except OSError as error:
        raise DataError(
            f"{key}: {path} cannot be read ({error.strerror}), so its shards are unknown; {remedy}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{key}: {path} is damaged at {place} ({first['msg']}), so it proves nothing; {remedy}"
        ) from error
    if not manifest.shards:
        raise DataError(f"{key}: {path} lists no shard, so there is no text to read; {remedy}")
    return manifest


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json, whole or not at all."""
    atomic_write(Path(folder) / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
