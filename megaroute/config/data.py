"""`data`: shards, mixture, tokenizer, packing, and the processes that read them."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
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


SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Change = Literal["manifest", "tokenizer", "sequence_length", "mixture", "seed", "packing"]
ONLY_SOURCE = "train"
"""Name of the source when data.train is one path."""


class SourceConfig(Section):
    """One source of a mixture."""

    path: ShardFolder
    """Folder of shards with its manifest.json."""
    weight: PositiveFloat = 1.0
    """Share of the tokens of the run, relative to the weights of the other sources."""


def _form(value: Any) -> str:
    return "mixture" if isinstance(value, dict) else "folder"


Mixture = Annotated[dict[SourceName, SourceConfig], Field(min_length=1)]
Train = Annotated[Annotated[ShardFolder, Tag("folder")] | Annotated[Mixture, Tag("mixture")], Discriminator(_form)]


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

    train: Train
    """Folder of training shards with its manifest.json (tools/make_shards.py writes both): a path, a URL (http, https,
    s3 or another scheme of fsspec), or `pipe:` and a command that writes the file `{name}` to standard output.  Or
    several by name, each with `path` and `weight`, whose shares of the tokens follow the weights."""
    valid: ShardFolder | None = None
    """Folder of validation shards; no validation when not given."""
    tokenizer: Path
    """Sentencepiece model (tools/train_tokenizer.py)."""
    sequence_length: PositiveInt = 1024
    """Tokens S of a row that the model sees; a row takes S + 1 tokens of text, so that each position has its target."""
    attend_across_documents: bool = True
    """Whether a token may attend to the documents before its own in the same row."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How documents fill rows: `concat` puts them one after another, and what does not fit continues in a later row;
    `best_fit` cuts none that fits into a row, and leaves the end of a row empty where no other one fits."""
    packing_window: PositiveInt = 16
    """Documents of a lane among which `best_fit` chooses."""
    lanes: PositiveInt = 64
    """Virtual lanes V of the stream.  A multiple of every data-parallel size times data.workers that the run will ever
    use; fixed for a run."""
    seed: NonNegativeInt = 0
    """Seed of the order of documents."""
    verify: Literal["full", "size"] = "full"
    """Before a run: `full` compares every shard's sha256 with the manifest, `size` only its bytes."""
    on_damage: Literal["fail", "skip"] = "fail"
    """A document that cannot be read ends the run, or its lane skips the rest of the slice, which is recorded."""
    skip_budget: NonNegativeInt = 100
    """Slices that a run may skip for damage; one more ends it."""
    workers: NonNegativeInt = 0
    """Processes beside each rank that read and tokenise its rows; 0 does it in the rank, between steps."""
    prefetch: PositiveInt = 16
    """Rows that each worker makes ahead."""
    worker_timeout_s: PositiveFloat = 300.0
    """Seconds without a row from a worker after which the run ends."""
    max_open_files: PositiveInt = 32
    """Shards that a reading process keeps open, over all sources."""
    allow_change: tuple[Change, ...] = ()
    """What may differ from the checkpoint that the run resumes; without it a difference is refused.  Each change is
    recorded in the checkpoints that follow."""

    remote: RemoteConfig = RemoteConfig()
    cache: CacheConfig = CacheConfig()

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Training sources by name, in the order of their names, so that the order in the file means nothing."""
        if isinstance(self.train, dict):
            return dict(sorted(self.train.items()))
        return {ONLY_SOURCE: SourceConfig(path=self.train)}

    @property
    def pads(self) -> bool:
        """Whether rows may end in padding."""
        return self.packing == "best_fit"

    @property
    def folders(self) -> dict[str, Path | str]:
        """Every folder of shards by the dotted key that names it."""
        if isinstance(self.train, dict):
            found = {f"data.train.{name}": source.path for name, source in self.sources.items()}
        else:
            found = {"data.train": self.train}
        return found if self.valid is None else {**found, "data.valid": self.valid}
