"""The lines of `metrics.jsonl`: one frozen record per step, validation, scoring of tasks or event.

A line is a JSON object whose `kind` is "train", "valid", "tasks" or the kind of the event.  A float is written in its
shortest decimal form, which loads back bit-equal.  JSON has no NaN and no infinity: they are written as the strings
"NaN", "Infinity" and "-Infinity", and become floats again when read.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

EventKind = Literal["start", "resume", "checkpoint", "stop", "end", "error", "alarm", "recovered"]
EVENT_KINDS: tuple[str, ...] = get_args(EventKind)

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One optimizer step."""

    step: int
    """Steps completed, this one included; the first is 1."""
    attempt: int
    """Which start of the run computed it; the first is 1."""
    samples: int
    """Rows consumed since the start of the run."""
    tokens: int
    """Tokens consumed since the start of the run."""
    loss: float
    """Cross entropy, nats per token, mean over the global batch."""
    budget_loss: float
    """What the density budget adds to the loss."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate of this step."""
    seconds: float
    """Wall time of this step."""
    tokens_per_second: float
    """Tokens of this step over its wall time, all ranks together."""
    executed_flops: float
    """Floating-point operations of this step, forward and backward, all ranks, counted from what was gathered."""
    dense_flops: float
    """The same for the model in which every token executes every layer."""
    density: tuple[float, ...]
    """Share of tokens executed, per routed unit."""
    skipped_update: bool
    """Whether the update was left out: loss or gradient were not finite, or a spike."""
    nonfinite: int
    """Consecutive steps whose loss or gradient was not finite, this one included."""
    batch: int
    """Rows of the global batch."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """executed_flops by part: key_value, query_output, attention, mlp, router, padding (thrown away), head."""
    rows: tuple[int, ...] = ()
    """Rows computed, per routed unit, padding included."""
    overflow: tuple[int, ...] = ()
    """Rows that the router wanted and the capacity did not allow, per routed unit."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Choices that fell on each expert, per routed unit, before the limit; empty unless units are mixtures of
    experts."""
    overflow_flops: float = 0.0
    """What these would have cost; they were not executed."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """How evenly the computed rows lie.  `ranks`: maximum over mean of all ranks; `rank_rows`: rows of each rank,
    [stages][replicas], attention and MLP half a row each, dense layers included; `units`: maximum over mean of the
    replicas, per routed unit; `stages`: mean of each stage's ranks; `stages_max_over_mean`: of these."""
    spikes: Mapping[str, float] = field(default_factory=dict)
    """What stood out, `loss` or `grad_norm`, by how many robust standard deviations (train.spike)."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Where the rows came from.  Since the start of the run: `digest`, checksum of the rows, equal at equal `samples`
    for runs that read the same; `tokens` by source; `skipped` slices.  Of this step: `wait_s`, seconds that the replica
    waiting longest waited for its rows; `padding`, share of the positions that held no token."""

    @property
    def data_shares(self) -> dict[str, float]:
        """Share of all tokens so far, by source."""
        tokens: Mapping[str, int] = self.data.get("tokens", {})
        total = sum(tokens.values())
        return {name: count / total for name, count in tokens.items()} if total else {}

    @property
    def step_tokens(self) -> int:
        """Tokens of this step."""
        return round(self.tokens_per_second * self.seconds)

    @property
    def dropped(self) -> tuple[float, ...]:
        """Share of what each unit's router chose that found no capacity; of experts, of their choices."""
        counts = zip(self._wanted, self.overflow, strict=True) if self.overflow else ()
        return tuple(over / wanted if wanted else 0.0 for wanted, over in counts)

    @property
    def overflow_share(self) -> float:
        """Share of what all routers chose together that found no capacity."""
        wanted = sum(self._wanted) if self.overflow else 0.0
        return sum(self.overflow) / wanted if wanted else 0.0

    @property
    def _wanted(self) -> tuple[float, ...]:
        if self.choices:
            return tuple(float(sum(of_unit)) for of_unit in self.choices)
        kept = (share * self.step_tokens for share in self.density)
        return tuple(k + over for k, over in zip(kept, self.overflow, strict=True))


@dataclass(frozen=True, kw_only=True)
class ValidRecord:
    """One validation, after `step` steps."""

    step: int
    attempt: int
    loss: float
    """Cross entropy, nats per token."""
    bits_per_byte: float
    """Cross entropy, bits per byte of text: does not depend on the tokenizer."""
    density: tuple[float, ...]
    """Share of tokens executed, per routed unit, as the router decides at inference."""
    rows: int
    """Rows that were scored."""
    flops_per_token: float = 0.0
    """Floating-point operations of the forward pass, per token; 0 where they were not counted."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What the model got in one task."""

    metric: str
    """Which number of the task this is, such as acc."""
    value: float
    """Mean over the documents."""
    stderr: float | None
    """Standard error of the mean; None for a single document."""
    documents: int
    """Documents that were scored."""
    layers_executed: float | None = None
    """Mean layers executed for what was scored."""


@dataclass(frozen=True, kw_only=True)
class TasksRecord:
    """Tasks scored after `step` steps."""

    step: int
    attempt: int
    scores: Mapping[str, TaskScore]
    """By name of the task."""
    seconds: float
    """Wall time that it took."""


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened after `step` steps.

    The report shows these values of a "start" or "resume" event when they are there: `parameters` (of the model),
    `layout` (text), `device`, `world_size`, `units` (labels of the routed units); the metrics writer adds the last
    three.
    """

    kind: EventKind
    step: int
    attempt: int
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)


Record = TrainRecord | ValidRecord | TasksRecord | EventRecord


def to_json(record: Record) -> str:
    """The record as one line of strict JSON, without the newline.  Raises TypeError on a value that is not JSON's."""
    match record:
        case TrainRecord():
            kind: dict[str, Any] = {"kind": "train"}
        case ValidRecord():
            kind = {"kind": "valid"}
        case TasksRecord():
            kind = {"kind": "tasks"}
        case EventRecord():
            kind = {}
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return json.dumps(_plain(kind | values), allow_nan=False)


def from_json(line: str) -> Record | None:
    """The record of one line; None when its kind is not known here, as in a file of a later version.

    Keys that are not known here are ignored, and what an earlier version did not write has its default.  Raises
    ValueError when the line is not a JSON object, or lacks a value.
    """
    raw = json.loads(line)
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind is None:
        raise ValueError("a line of metrics is a JSON object with a kind")
    if kind == "train":
        return TrainRecord(**_values(TrainRecord, raw))
    if kind == "valid":
        return ValidRecord(**_values(ValidRecord, raw))
    if kind == "tasks":
        values = _values(TasksRecord, raw)
        values["scores"] = {name: TaskScore(**_values(TaskScore, score)) for name, score in values["scores"].items()}
        return TasksRecord(**values)
    if kind in EVENT_KINDS:
        return EventRecord(**_values(EventRecord, raw))
    return None


def _values(cls: type[Record | TaskScore], raw: Mapping[str, Any]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    names = [f.name for f in fields if f.name in raw]
    missing = [f.name for f in fields if f.name not in raw and not _has_default(f)]
    if missing:
        raise ValueError(f"a {raw.get('kind', 'score of a task')!r} line of metrics lacks {', '.join(missing)}")
    return {name: raw[name] if name in ("kind", "message") else _restored(raw[name]) for name in names}


def _has_default(of: "dataclasses.Field[Any]") -> bool:
    return of.default is not dataclasses.MISSING or of.default_factory is not dataclasses.MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, TaskScore):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    return value
