"""`status.json` of a run directory: what a person on call looks at first, and what decides whether a job starts again.

state      queued | running | requeued | finished | stopped | failed
why        the reason of the state, a sentence
attempts   every start that a job made: job, restart, hosts, times, checkpoint at its start and end, how it ended
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megaroute.common.errors import LaunchError
from megaroute.common.files import write_json
from megaroute.common.log import get_logger
from megaroute.launch import signs
from megaroute.launch.exits import Outcome

FILE_NAME = "status.json"
State = Literal["queued", "running", "requeued", "finished", "stopped", "failed"]

RENEW_S = 60.0
"""Seconds after which a running job writes its status again."""
SILENCE_S = 180.0
"""After this time without a sign of a running job, something is wrong."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Attempt:
    """One start of a job."""

    job: str
    restart: int
    hosts: tuple[str, ...]
    started: str
    first_step: int
    """Step of the newest checkpoint at the start, 0 without one."""
    chain: str = ""
    """Name of the chain of jobs that it belongs to; "" for a job that requeues itself."""
    ended: str = ""
    last_step: int | None = None
    """The same at the end; None while it runs, and when it was killed with its node."""
    ending: str = ""
    """See exits.Ending; "" like None above."""
    why: str = ""


@dataclass(frozen=True)
class Status:
    """The content of the file."""

    state: State
    why: str = ""
    job: str = ""
    restart: int = 0
    hosts: tuple[str, ...] = ()
    step: int = 0
    """Last step of `metrics.jsonl`."""
    queued: str = ""
    started: str = ""
    updated: str = ""
    chain: str = ""
    """As in Attempt: a verdict holds for all jobs of a chain."""
    excluded: tuple[str, ...] = ()
    """Nodes that failed their check; the job asks SLURM for others."""
    attempts: tuple[Attempt, ...] = field(default=())

    def ended(self, outcome: Outcome, checkpoint: int) -> "Status":
        """The same with the end of the newest attempt."""
        last = replace(self.attempts[-1], ended=now(), last_step=checkpoint, ending=outcome.ending, why=outcome.why)
        return replace(self, attempts=(*self.attempts[:-1], last))


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(run_dir: Path) -> Status | None:
    """The status of a run directory; None without one.  Raises LaunchError when the file is not one of ours."""
    path = run_dir / FILE_NAME
    try:
        tree = json.loads(path.read_text())
        attempts = tuple(Attempt(**{**one, "hosts": tuple(one["hosts"])}) for one in tree.pop("attempts"))
        lists = {name: tuple(tree[name]) for name in ("hosts", "excluded")}
        return Status(**{**tree, **lists, "attempts": attempts})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{path} cannot be read ({error}); remove it, it is written anew at the next start") from None


def write(run_dir: Path, status: Status) -> Status:
    """Write the file, whole or not at all, with the time and the run's last step."""
    status = replace(status, updated=now(), step=last_step(run_dir))
    write_json(run_dir / FILE_NAME, asdict(status))
    return status


def keep(run_dir: Path, status: Status) -> bool:
    """`write` for the supervisor of a run; whether the run is still its own.

    It is not when a later start of the same job has written the file: this one was cut off from SLURM, which gave the
    job other nodes, and nothing is written.  A file system that is full or gone is logged: no run may end for a status.
    """
    try:
        found = read(run_dir)
    except LaunchError:
        found = None
    if found is not None and found.job == status.job and found.restart > status.restart:
        return False
    try:
        write(run_dir, status)
    except OSError as error:
        log.warning("%s is not up to date: it cannot be written (%s)", run_dir / FILE_NAME, error)
    return True


def checkpoint_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    steps = [int(marker.parent.name[5:]) for marker in (run_dir / "checkpoints").glob("step-*/complete.json")]
    return max(steps, default=0)


def last_step(run_dir: Path) -> int:
    """Last step in `metrics.jsonl`, 0 without one."""
    return int(signs.last_train(signs.records(run_dir)).get("step", 0))


def table(run_dirs: Sequence[Path]) -> str:
    """A line for each run, columns aligned: run, state, job, attempt, step, loss, checkpoint, age, hosts, reason."""
    head = ("RUN", "STATE", "JOB", "ATTEMPT", "STEP", "LOSS", "SAVED", "SEEN", "HOSTS", "WHY")
    rows = [head, *(_row(run_dir) for run_dir in run_dirs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(run_dir: Path) -> tuple[str, ...]:
    found = signs.records(run_dir)
    record = signs.last_train(found)
    loss = record.get("loss")
    shown = f"{loss:.3f}" if isinstance(loss, float) else str(loss or "-")
    numbers = (f"{record.get('step', 0):,}", shown, f"{checkpoint_step(run_dir):,}")
    status = read(run_dir)
    if status is None:
        return _row_by_hand(run_dir, found, numbers)
    age = _age_s(status.updated)
    silent = status.state == "running" and age > SILENCE_S
    why = f"no sign of job {status.job} for {duration(age)}: look at squeue" if silent else status.why
    state, attempts = "running?" if silent else status.state, str(len(status.attempts) or "-")
    seen, hosts = duration(age), _short(status.hosts)
    return (str(run_dir), state, status.job or "-", attempts, *numbers, seen, hosts, why or "-")


def _row_by_hand(run_dir: Path, found: Sequence[dict[str, Any]], numbers: tuple[str, ...]) -> tuple[str, ...]:
    """Of a run that no job has started: `megaroute launch` and torchrun keep no status."""
    if not run_dir.is_dir():
        return (str(run_dir), "-", "-", "-", *numbers, "-", "-", "no such directory")
    sign, attempt = signs.of_start(run_dir, found), max((record.get("attempt", 0) for record in found), default=0)
    silent = sign.state == "running" and sign.age_s > SILENCE_S
    why = f"no sign of it for {duration(sign.age_s)}: killed?" if silent else sign.why
    state, hosts = "running?" if silent else sign.state, _short(sign.hosts) or "-"
    return (str(run_dir), state, "-", str(attempt or "-"), *numbers, duration(sign.age_s), hosts, why or "-")


def _age_s(time: str) -> float:
    try:
        return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time)).total_seconds()
    except ValueError:
        return 0.0


def duration(seconds: float) -> str:
    """Seconds in the unit a person would say: "12 s", "5 min", "3 h", "2 d"."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _short(hosts: Sequence[str]) -> str:
    return ",".join(hosts) if len(hosts) <= 3 else f"{hosts[0]} .. {hosts[-1]} ({len(hosts)})"
