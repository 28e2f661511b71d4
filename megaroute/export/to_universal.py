"""From a checkpoint to DeepSpeed's universal format, with which a DeepSpeed engine goes on training.

OUT/
  latest_universal, latest         the tag
  global_step12/                   the tag: optimizer steps done
    mp_rank_00_model_states.pt     counters of steps, and for the client: run, data cursor, buffers
    zero/
      optimizer_state.pt           release of DeepSpeed, parameter groups
      PARAMETER/                   fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaroute.checkpoint.integrity import damaged, verify
from megaroute.checkpoint.layout import RunRecord, read_cursor, read_run, resolve
from megaroute.checkpoint.tensors import TensorInfo, Tensors
from megaroute.checkpoint.unpickle import COMMON, read_common
from megaroute.common.errors import CheckpointError
from megaroute.export.destination import appearing, check_destination
from megaroute.export.universal_format import DEEPSPEED, keys_of, patterns

STATES = {"fp32": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of a parameter's files, and what Megatron-core calls what is in them."""
OPTIMIZER = "optimizer."
BUFFER = ".router.state."
"""In the names of what routers remember; everything else of the model is trained."""
FILES = 2**15
"""Bytes of the four files of a parameter beside its numbers: headers, and blocks of the file system."""
UNIVERSAL_VERSION = 0.4
"""deepspeed.checkpoint.constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE."""


@dataclass(frozen=True)
class Universal:
    """What was written."""

    tag: str
    """Name of the folder in the output, by which an engine can load it."""
    step: int
    """Optimizer steps done, by AdamW's own count: steps that were skipped are not in it."""
    parameters: int
    """Tensors with a master copy and two moments each."""
    bytes: int
    """Of these, all in float32."""


def to_universal(checkpoint: Path, out: Path) -> Universal:
    """Write a checkpoint, of any layout, to the folder `out` for `engine.load_checkpoint`.

    Parameters have the names and shapes of the model that `megaroute.model.build` makes for one process, and float32
    master weights whatever the precision of the training.  No more than the largest tensor is in memory at a time.
    Raises UserError for a checkpoint that is incomplete, damaged or has no optimizer state, and for a destination that
    cannot be written, before anything is written.
    """
    source = _open(resolve(checkpoint))
    check_destination(out, source.bytes + FILES * len(source.parameters))
    verify(source.path)
    with appearing(out) as folder:
        tag = folder / f"global_step{source.record.step}"
        _write_parameters(source, tag / "zero")
        _save(_optimizer_state(source), tag / "zero" / "optimizer_state.pt")
        _save(_model_states(source), tag / "mp_rank_00_model_states.pt")
        # An engine that was not told `load_universal` reads `latest`: it finds no weights in the folder and fails,
        # where without the file it would warn and train on with random ones.
        for name in ("latest_universal", "latest"):
            (folder / name).write_text(tag.name)
    return Universal(tag.name, source.adam_step, len(source.parameters), source.bytes)


@dataclass(frozen=True)
class _Source:
    """What is known of a checkpoint before its tensors are read."""

    path: Path
    record: RunRecord
    tensors: Tensors
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    patterns: dict[str, list[str]]
    adam_step: int
    bytes: int


def _open(path: Path) -> _Source:
    record, tensors = read_run(path), Tensors(path)
    known = {info.key: info for info in tensors}
    model = [key for key in known if not key.startswith(OPTIMIZER)]
    parameters = tuple(name for name in model if BUFFER not in name)
    states = [info for name in parameters for info in _states(path, name, known)]
    found = patterns(parameters, gated=record.model.get("activation") != "gelu")
    buffers = tuple(name for name in model if BUFFER in name)
    size = sum(info.bytes for info in states)
    return _Source(path, record, tensors, parameters, buffers, found, _adam_step(path), size)


def _states(path: Path, name: str, known: dict[str, TensorInfo]) -> Iterator[TensorInfo]:
    """Master weights and moments of a parameter; raises CheckpointError when one is not there."""
    for state in STATES.values():
        info = known.get(_key(state, name))
        if info is None:
            raise CheckpointError(
                f"{path} has no optimizer state ({state}) of {name}, as an imported model has none, and a DeepSpeed "
                "engine goes on from nothing less; name a checkpoint of a run that has trained"
            )
        if info.shape != known[name].shape or info.dtype != torch.float32:
            raise CheckpointError(
                f"{path} has {state} of {name} as {info.dtype} {list(info.shape)}, and the parameter is "
                f"{list(known[name].shape)}, so it is not this model's optimizer state; name another checkpoint"
            )
        yield info


def _key(state: str, name: str) -> str:
    return f"{OPTIMIZER}state.{state}.{name}"


def _adam_step(path: Path) -> int:
    """Steps that AdamW has done: its bias correction is of this one."""
    steps = set(_steps(read_common(path)))
    if len(steps) != 1:
        raise damaged(path / COMMON, f"groups of the optimizer are at steps {sorted(steps)}, they should be at one")
    return int(steps.pop())


def _steps(value: Any) -> Iterator[float]:
    """`step` of all parameter groups in a state dict, however deep: chained optimizers have one each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ([float(inner)] if key == "step" else _steps(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _steps(inner)


def _write_parameters(source: _Source, zero: Path) -> None:
    step = torch.tensor(float(source.adam_step))  # as torch's AdamW keeps it; DeepSpeed's take it as a number
    for name in source.parameters:
        keys = keys_of(name, source.patterns)
        for file, state in STATES.items():
            _save({"param": source.tensors.read(_key(state, name)), **keys}, zero / name / f"{file}.pt")
        _save(step, zero / name / "step.pt")


def _optimizer_state(source: _Source) -> dict[str, Any]:
    """The loader restores as many parameter groups as are listed, without a word of those beyond.

    How the engine groups parameters is not known: it cannot have more groups than parameters.  They are empty, so that
    learning rate, weight decay and betas are the engine's own.
    """
    return {"ds_version": DEEPSPEED, "param_groups": [{} for _ in source.parameters]}


def _model_states(source: _Source) -> dict[str, Any]:
    """Counters that the engine takes, and the rest, which `load_checkpoint` returns as its client state."""
    record = source.record
    info = {"universal_checkpoint_version": UNIVERSAL_VERSION, "original_vocab_size": record.model["vocab_size"]}
    return {
        "module": {},
        "ds_version": DEEPSPEED,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": record.step,
        "global_samples": record.samples,
        "skipped_steps": record.step - source.adam_step,
        "lr_scheduler": {"last_batch_iteration": record.step - 1},  # all that DeepSpeed's own schedules keep
        "universal_checkpoint_info": info | source.patterns,
        "buffers": {name: source.tensors.read(name) for name in source.buffers},
        "run": asdict(record),
        "cursor": read_cursor(source.path),
    }


def _save(value: Any, file: Path) -> None:
    """Through a Python file, whose errors are OSError; torch's own writer raises RuntimeError on a full disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as opened:
        torch.save(value, opened)
