"""Build every part of a run, and put it where the newest checkpoint left it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megaroute.checkpoint.layout import RunRecord, resolve
from megaroute.checkpoint.lease import Lease
from megaroute.checkpoint.manager import CheckpointManager
from megaroute.checkpoint.state import load_state
from megaroute.common.log import get_logger
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import Cursor, merge_parts
from megaroute.data.identity import data_identity
from megaroute.data.ledger import Ledger
from megaroute.data.stream import open_stream
from megaroute.data.tokenizer import Tokenizer
from megaroute.model.build import build_chunks, routers
from megaroute.optim.build import build_optimizer, wrap
from megaroute.optim.schedule import Schedule, batch_size
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.groups import bring_up
from megaroute.platform.device import Platform
from megaroute.training.heartbeat import Pulse
from megaroute.training.parts import Parts
from megaroute.training.state import GuardState, TrainState

log = get_logger(__name__)


def setup(
    config: Config, platform: Platform, world_size: int, lease: Lease | None = None, pulse: Pulse | None = None
) -> Parts:
    """All parts of the run on `world_size` ranks, restored from the run directory's newest checkpoint if there is one.

    The process group must be up.  `lease` is rank 0's right to write checkpoints, where it has taken one.  Raises
    UserError when data or checkpoint do not fit the configuration.
    """
    dims = ParallelDims.from_config(config.parallel, world_size)
    groups = bring_up(dims, config.train.seed)
    chunks = build_chunks(config, dims, groups.pipeline_rank, platform)
    wrapped = wrap(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    parts = Parts(
        config=config,
        platform=platform,
        groups=groups,
        chunks=chunks,
        wrapped=wrapped,
        routers=routers(chunks),
        optimizer=optimizer,
        schedule=Schedule(config, optimizer),
        batch_size=batch_size(config, dims.data),
        stream=None,
        ledger=Ledger(),
        token_bytes=_token_bytes(config),
        checkpoints=CheckpointManager(
            config.run_directory / "checkpoints",
            config.checkpoint,
            chunks,
            optimizer,
            groups.data_group,
            lease,
        ),
        state=TrainState(),
        run_dir=Path(config.run_directory),
        resumed_from=None,
        pulse=pulse or Pulse(),
    )
    parts.pulse.follow(wrapped)
    return _positioned(parts)


def _token_bytes(config: Config) -> np.ndarray:
    """Bytes of text of each id; rows of the embedding beyond the tokenizer's pieces stand for none."""
    known = Tokenizer(config.data.tokenizer).token_bytes()
    return np.pad(known, (0, config.model.vocab_size - len(known)))


def _positioned(parts: Parts) -> Parts:
    """Restore, then open the stream where the run stands."""
    restored = parts.checkpoints.restore() if parts.config.checkpoint.resume else None
    data = parts.config.data
    cursor, ledger = None, Ledger()
    if restored is not None:
        record, saved = restored
        cursor = Cursor.from_json(saved)
        ledger = Ledger(cursor.digest, dict(cursor.tokens), cursor.skipped)
        state = parts.state
        state.step, state.samples, state.tokens, state.nonfinite = (
            record.step,
            record.samples,
            record.tokens,
            record.nonfinite,
        )
        state.guards = GuardState(**record.guards)
        parts = replace(parts, resumed_from=record.step)
    elif parts.config.checkpoint.init_from is not None:
        _start_from(parts, resolve(parts.config.checkpoint.init_from))
    parts = replace(parts, ledger=ledger)
    if parts.reads_tokens:
        stream = open_stream(data, "train", parts.groups.data_rank, parts.groups.dims.data, cursor)
        parts = replace(parts, stream=stream)
    elif cursor is not None:
        cursor.continued(data_identity(data), data.allow_change)  # so that every rank refuses what one refuses
    return parts


def _start_from(parts: Parts, checkpoint: Path) -> None:
    """Give a new run the weights of another one's checkpoint, of any layout and precision."""
    load_state(checkpoint, parts.chunks, None, parts.groups.data_group, parts.config.checkpoint.verify)
    parts.optimizer.reload_model_params()  # masters of 16-bit weights are copies
    log.info("starting with the weights of %s", checkpoint)


def run_record(parts: Parts) -> RunRecord:
    """What a checkpoint says of the run besides tensors and data cursor."""
    counters = asdict(parts.state)
    del counters["attempt"]
    return RunRecord(
        **counters,
        model=parts.config.model.model_dump(mode="json"),
        routing=routing_shape(parts.config.model, parts.config.routing),
        layout=parts.groups.dims.describe(),
    )


def gather_cursor(parts: Parts) -> dict[str, Any] | None:
    """The data cursor of all replicas on rank 0, None elsewhere.  All ranks call it."""
    speaks = parts.groups.is_first_stage and parts.groups.tensor_rank == 0 and parts.stream is not None
    mine = parts.stream.cursor_part() if speaks and parts.stream is not None else None
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() != 0:
        return None
    given = [part for part in gathered if part is not None]
    stream = parts.stream
    assert stream is not None, "rank 0 is of the first stage, which reads"
    return merge_parts(given, parts.state.samples, stream.identity, parts.ledger, stream.changes).to_json()
