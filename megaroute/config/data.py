"""`data`: shards, mixture, tokenizer, packing, and the processes that read them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
)

from megaroute.config.section import Section

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Change = Literal["manifest", "tokenizer", "sequence_length", "mixture", "seed", "packing"]
ONLY_SOURCE = "train"
"""Name of the source when data.train is one path."""


class SourceConfig(Section):
    """One source of a mixture."""

    path: Path
    """Folder of shards with its manifest.json."""
    weight: PositiveFloat = 1.0
    """Share of the tokens of the run, relative to the weights of the other sources."""


def _form(value: Any) -> str:
    return "mixture" if isinstance(value, dict) else "folder"


Mixture = Annotated[dict[SourceName, SourceConfig], Field(min_length=1)]
Train = Annotated[Annotated[Path, Tag("folder")] | Annotated[Mixture, Tag("mixture")], Discriminator(_form)]


class DataConfig(Section):
    """Where the text comes from and how it becomes rows.  Relative paths start at the working directory."""

    train: Train
    """Folder of training shards with its manifest.json (tools/make_shards.py writes both), or several by name, each
    with `path` and `weight`: their shares of the tokens follow the weights."""
    valid: Path | None = None
    """Folder of validation shards; no validation when not given."""
    tokenizer: Path
    """Sentencepiece model (tools/train_tokenizer.py)."""
    sequence_length: PositiveInt = 1024
    """Tokens S of a row that the model sees; a row takes S + 1 tokens of text, so that each position has its target."""
    attend_across_documents: bool = True
    """Whether a token may attend to the documents before its own in the same row."""
    packing: Literal["concat"] = "concat"
    """How documents fill rows: `concat` puts them one after another, and what does not fit continues in a later row."""
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

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """Training sources by name, in the order of their names, so that the order in the file means nothing."""
        if isinstance(self.train, dict):
            return dict(sorted(self.train.items()))
        return {ONLY_SOURCE: SourceConfig(path=self.train)}

    @property
    def folders(self) -> dict[str, Path]:
        """Every folder of shards by the dotted key that names it."""
        if isinstance(self.train, dict):
            found = {f"data.train.{name}": source.path for name, source in self.sources.items()}
        else:
            found = {"data.train": self.train}
        return found if self.valid is None else {**found, "data.valid": self.valid}
