"""From a folder that transformers loads to a run directory with a checkpoint, which a run can start from."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaroute.checkpoint.layout import WEIGHTS_ONLY, RunRecord, directory, finish, read_run
from megaroute.checkpoint.writer import Item, describe_tensors, write_common, write_items
from megaroute.common.errors import ConfigError, UserError
from megaroute.common.files import atomic_write, write_json
from megaroute.config.checks import check_config
from megaroute.config.data import ONLY_SOURCE
from megaroute.config.load import dump_config, make_config
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import Cursor
from megaroute.data.identity import identity_of
from megaroute.export.destination import appearing, check_destination
from megaroute.export.foreign_tokenizer import read_tokenizer
from megaroute.export.hf_folder import OURS, HFFolder
from megaroute.export.hf_shape import KINDS, check_tensors, longest_row, model_section
from megaroute.export.naming import Piece, pieces
from megaroute.export.source import Source
from megaroute.export.tokenizer import SENTENCEPIECE_FILE
from megaroute.export.upcycle import (
    check_upcycled,
    exported_routing,
    memory,
    router_tensors,
    states,
    upcycled_routing,
)
from megaroute.launch.rundir import CONFIG_FILE, VERSION_FILE, version_record

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NO_SHARDS = "data/train"
"""An imported model has no text; this stands in its configuration until a run says which."""

Check = Callable[[HFFolder, Source], dict[str, Any]]
"""Compares what was written with its source and says what it found; raises UserError when they differ."""


@dataclass(frozen=True)
class Imported:
    """What was written."""

    config: Config
    kind: str
    """model_type of the source."""
    upcycled: bool
    tokenizer: str
    """A sentence about the tokenizer that a run needs."""
    bytes: int
    """Of the weights."""
    found: dict[str, Any] = field(default_factory=dict)
    """What the check found; empty without one."""


@dataclass(frozen=True)
class _Plan:
    """What will be written."""

    folder: HFFolder
    config: Config
    upcycled: bool
    dtype: torch.dtype

    @property
    def pieces(self) -> list[Piece]:
        """Tensors of the checkpoint that the folder has the parts of."""
        found = pieces(self.config.model, self.config.routing)
        return [piece for piece in found if not (self.upcycled and ".router." in piece.source)]

    @property
    def bytes(self) -> int:
        """Bytes of weights."""
        return sum(self.folder.tensors[name].bytes for piece in self.pieces for name in piece.names)

    def items(self) -> Iterator[Item]:
        """Tensors of the checkpoint, one in memory at a time."""
        for piece in self.pieces:
            yield _item(piece.source, piece.join([self.folder.read(name) for name in piece.names]))
        for prefix, target in states(self.config):
            own = router_tensors(self.config, self.dtype) if self.upcycled else memory(target)
            yield from (_item(prefix + name, tensor) for name, tensor in own.items())


def from_hf(
    model: Path,
    out: Path,
    check: Check | None,
    routed: bool | None = None,
    overrides: Iterable[str] = (),
    tokenizer: Path | None = None,
) -> Imported:
    """Write the model in the folder `model` as a checkpoint of a run directory `out`, which appears only when `check`
    is content.

    No more than the largest matrix, in its parts and put together, is in memory at a time, before the check.

    Args:
        routed: whether tokens may skip layers; as in the source when None.  Dense models are upcycled.
        overrides: of the configuration that is written, as `section.key=value`.
        tokenizer: sentencepiece model, where the folder has none.

    Raises:
        UserError: what cannot be imported, before anything is written; a result that is another model.
    """
    folder = HFFolder(model, KINDS)
    plan = _plan(folder, out, routed, list(overrides))
    known = read_tokenizer(folder.path, tokenizer, plan.config.model.vocab_size)
    check_destination(out, plan.bytes)
    with appearing(out) as work:
        atomic_write(work / SENTENCEPIECE_FILE, known.raw)
        atomic_write(work / CONFIG_FILE, dump_config(plan.config))
        write_json(work / VERSION_FILE, version_record())
        checkpoint = _write(plan, directory(work / "checkpoints", 0), known.tokenizer.fingerprint)
        source = Source(checkpoint, plan.config, read_run(checkpoint), known.tokenizer)
        found = check(folder, source) if check else {}
    return Imported(plan.config, folder.kind, plan.upcycled, known.sentence(out), plan.bytes, found)


def _plan(folder: HFFolder, out: Path, routed: bool | None, overrides: list[str]) -> _Plan:
    model = model_section(folder)
    ours = exported_routing(folder.settings) if folder.kind == OURS else {"router": "dense"}
    was_routed = ours["router"] != "dense"
    if was_routed and routed is False:
        raise UserError(
            f"{folder.path} is a routed model, whose layers are not what they are without their routers; leave --as out"
        )
    upcycled = bool(routed) and not was_routed
    stored = folder.tensors.get("model.embed_tokens.weight")
    dtype = stored.dtype if stored else torch.float32
    routing = upcycled_routing(model["num_layers"]) if upcycled else ours
    tree = _tree(folder, out, model, routing, PRECISIONS[dtype])
    plain = make_config(tree, folder.path)
    config = make_config(tree, folder.path, overrides)
    _check_kept(plain, config, upcycled)
    check_config(config)
    plan = _Plan(folder, config, upcycled, dtype)
    check_tensors(folder, {name for piece in plan.pieces for name in piece.names}, config.model)
    return plan


def _tree(
    folder: HFFolder, out: Path, model: dict[str, Any], routing: dict[str, Any], precision: str
) -> dict[str, Any]:
    place = out.absolute()
    settings = folder.settings
    return {
        "run": {"name": re.sub(r"[^A-Za-z0-9._-]", "-", place.name).lstrip("._-") or "imported"},
        "model": model,
        "routing": routing,
        "data": {
            "train": NO_SHARDS,
            "tokenizer": str(place / SENTENCEPIECE_FILE),
            "sequence_length": longest_row(folder),
            "attend_across_documents": settings.get("attend_across_documents", True),
        },
        "train": {"steps": 1000, "global_batch": 64, "precision": precision, "seed": settings.get("router_seed", 1234)},
        "checkpoint": {"init_from": str(place)},
    }


def _check_kept(plain: Config, config: Config, upcycled: bool) -> None:
    """Overrides may not make it another model."""
    if upcycled:
        check_upcycled(config)
    for key, value in plain.model.model_dump().items():
        given = getattr(config.model, key)
        if given != value and key != "init_std":
            raise ConfigError(f"model.{key}={given} would be another model: the source has {value}; leave it out")
    mine, theirs = (routing_shape(made.model, made.routing) for made in (config, plain))
    if not upcycled and mine != theirs:
        key = next(key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key))
        raise ConfigError(
            f"{key}={mine.get(key)} would be another model: the source has {theirs.get(key)}; leave it out, or give a "
            "dense model routers with --as routed"
        )


def _item(key: str, tensor: Tensor) -> Item:
    return Item(key, (0,) * tensor.dim(), tuple(tensor.shape), tensor)


def _write(plan: _Plan, path: Path, fingerprint: str) -> Path:
    """The checkpoint, complete."""
    path.mkdir(parents=True)
    written = write_items(plan.items(), path, rank=0)
    written.files.update(write_common({}, path))
    files = describe_tensors(path, [written])
    config = plan.config
    record = RunRecord(
        step=0,
        samples=0,
        tokens=0,
        nonfinite=0,
        model=config.model.model_dump(mode="json"),
        routing=routing_shape(config.model, config.routing),
        layout=WEIGHTS_ONLY,
    )
    cursor = Cursor(0, identity_of(config.data, {ONLY_SOURCE: ""}, fingerprint), {})
    finish(path, record, cursor.to_json(), files)
    return path
