"""Where records go.  A sink is one class with five methods; the base class takes everything and does nothing."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from megaroute.common.errors import ConfigError
from megaroute.metrics.records import EventRecord, Record, TasksRecord, TrainRecord, ValidRecord, to_json

FILE_NAME = "metrics.jsonl"


class NullSink:
    """Takes records and does nothing; other sinks override what they care about."""

    def train(self, record: TrainRecord) -> None:
        """Take one step."""

    def valid(self, record: ValidRecord) -> None:
        """Take one validation."""

    def tasks(self, record: TasksRecord) -> None:
        """Take one scoring of tasks."""

    def event(self, record: EventRecord) -> None:
        """Take one event."""

    def close(self) -> None:
        """Let go of files; nothing is taken afterwards."""


class JsonlSink(NullSink):
    """Appends every record to a file as one line, with one unbuffered write: a kill tears the last line at most."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, it stays open until close()
        self._end_torn_line(Path(path))

    def train(self, record: TrainRecord) -> None:
        self._write(record)

    def valid(self, record: ValidRecord) -> None:
        self._write(record)

    def tasks(self, record: TasksRecord) -> None:
        self._write(record)

    def event(self, record: EventRecord) -> None:
        self._write(record)

    def close(self) -> None:
        self._file.close()

    def _write(self, record: Record) -> None:
        self._file.write(to_json(record).encode() + b"\n")

    def _end_torn_line(self, path: Path) -> None:
        # Otherwise this attempt's first record would continue the torn line, and be lost with it.
        if self._file.tell() == 0:
            return
        with open(path, "rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                self._file.write(b"\n")


class TensorBoardSink(NullSink):
    """TensorBoard scalars through DeepSpeed's monitor, in a folder of its own per attempt: TensorBoard draws two
    attempts that computed the same steps as two curves, where one folder would give a zigzag.

    `units` are the labels of the routed units, for the names of the density curves; a train record of every
    `every`-th step is written.  Raises ConfigError when the package tensorboard is not installed.
    """

    def __init__(self, directory: str | Path, attempt: int, units: tuple[str, ...], every: int = 1) -> None:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self._units = units
        self._every = every
        target = {"enabled": True, "output_path": str(directory), "job_name": f"attempt-{attempt}"}
        try:
            with _as_rank_zero():
                self._monitor = MonitorMaster(get_monitor_config({"tensorboard": target}))
        except ImportError as error:
            raise ConfigError(
                f"metrics.tensorboard is true but TensorBoard cannot be imported ({error}), so no events "
                "can be written; install the package tensorboard or set metrics.tensorboard=false"
            ) from error

    def train(self, record: TrainRecord) -> None:
        if record.step % self._every:
            return
        self._write(
            record.step,
            {
                "loss/train": record.loss,
                "loss/budget": record.budget_loss,
                "optimizer/grad_norm": record.grad_norm,
                "optimizer/lr": record.lr,
                "speed/tokens_per_second": record.tokens_per_second,
                "speed/executed_flops_per_second": record.executed_flops / record.seconds,
                "speed/dense_equivalent_flops_per_second": record.dense_flops / record.seconds,
                "speed/executed_share": record.executed_flops / record.dense_flops,
                **self._per_unit("density", record.density),
                **self._per_unit("overflow", record.overflow),
                **{f"flops/{part}": flops for part, flops in record.flops.items()},
                **({"load/max_over_mean": record.load["ranks"]} if "ranks" in record.load else {}),
                **({"data/wait_s": record.data["wait_s"]} if "wait_s" in record.data else {}),
                **{f"data/share_{name}": share for name, share in record.data_shares.items()},
            },
        )

    def valid(self, record: ValidRecord) -> None:
        scores = {"loss/valid": record.loss, "loss/valid_bits_per_byte": record.bits_per_byte}
        self._write(record.step, {**scores, **self._per_unit("density_valid", record.density)})

    def tasks(self, record: TasksRecord) -> None:
        self._write(record.step, {f"tasks/{name}": score.value for name, score in record.scores.items()})

    def close(self) -> None:
        self._monitor.tb_monitor.summary_writer.close()

    def _per_unit(self, group: str, values: Sequence[float]) -> dict[str, float]:
        if not values:
            return {}
        return {f"{group}/{_tag(unit)}": value for unit, value in zip(self._units, values, strict=True)}

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        with _as_rank_zero():
            self._monitor.write_events([(name, value, step) for name, value in scalars.items()])


def _tag(unit: str) -> str:
    """layer_07, or layer_07_mlp: names in the order of the layers."""
    layer, *part = unit.split()
    return "_".join([f"layer_{int(layer):02d}", *part])


@contextlib.contextmanager
def _as_rank_zero() -> Iterator[None]:
    """Let DeepSpeed's monitors work in a process where DeepSpeed's communication was not started.

    They ask it for their rank and write on rank 0 only.  Starting it here is no way out: on a CPU it compiles an
    operator and waits for every rank.  The metrics writer lives on rank 0, so for the length of a call they hear 0.
    """
    from deepspeed.comm import comm

    if comm.is_initialized():
        yield
        return
    before, comm.cdb = comm.cdb, SimpleNamespace(is_initialized=lambda: True, get_rank=lambda group=None: 0)
    try:
        yield
    finally:
        comm.cdb = before
