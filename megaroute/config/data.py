"""`data`: shards, tokenizer, packing."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
)

from megaroute.config.section import Section

PIPE = "pipe:"


def is_remote(folder: object) -> bool:
    """Whether a folder of shards is a URL or a `pipe:` command rather than a path."""
    return isinstance(folder, str) and re.match(rf"{PIPE}|[A-Za-z][A-Za-z0-9+.-]*://", folder) is not None


def _folder(value: Any) -> Path | str:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no path or URL of a folder")
    if value.startswith(PIPE) and "{name}" not in value:
        raise ValueError(f"{value!r} does not say where the name of a file goes; write {{name}} there")
    return value if is_remote(value) else Path(value)


# A union of types would put its members' names into the dotted key of an error.
ShardFolder = Annotated[Path | str, PlainValidator(_folder), WithJsonSchema({"type": "string"})]


class RemoteConfig(Section):
    """How files are fetched from a URL, and local ones read again after a passing error."""

    attempts: PositiveInt = 6
    """Tries of one file."""
    connect_s: PositiveFloat = 15.0
    """Seconds for a server to answer."""
    stall_s: PositiveFloat = 30.0
    """Seconds for the next 64 KiB; a slower server counts as stalled."""
    backoff_s: NonNegativeFloat = 1.0
    """Seconds before the second try; doubled for each one after it, less up to a half by chance."""
    max_backoff_s: NonNegativeFloat = 30.0
    """Longest of these pauses, in seconds."""


class CacheConfig(Section):
    """Local copies of remote shards, shared by all processes of a node."""

    directory: Path | None = None
    """Folder on a disk of the node; when not given, one for the user below the system's folder of temporary files."""
    max_bytes: PositiveInt = 64 * 2**30
    """Bytes that it may hold.  What was not used for longest goes first; files in use stay."""


class DataConfig(Section):
    """Where the text comes from and how it becomes rows.  Relative paths start at the working directory."""

    train: ShardFolder
    """Folder of training shards with its manifest.json (tools/make_shards.py writes both): a path, a URL (http, https,
    s3 or another scheme of fsspec), or `pipe:` and a command that writes the file `{name}` to standard output."""
    valid: ShardFolder | None = None
    """Folder of validation shards; no validation when not given."""
    tokenizer: Path
    """Sentencepiece model (tools/train_tokenizer.py)."""
    sequence_length: PositiveInt = 1024
    """Tokens S of a row that the model sees; a row takes S + 1 tokens of text, so that each position has its target."""
    attend_across_documents: bool = True
    """Whether a token may attend to the documents before its own in the same row."""
    lanes: PositiveInt = 64
    """Virtual lanes V of the stream.  A multiple of every data-parallel size the run will ever use; fixed for a run."""
    seed: NonNegativeInt = 0
    """Seed of the order of documents."""
    verify: Literal["full", "size"] = "full"
    """Before a run: `full` compares every shard's sha256 with the manifest, `size` only its bytes."""
    remote: RemoteConfig = RemoteConfig()
    cache: CacheConfig = CacheConfig()
