"""Which start of a run may write its checkpoints: old ranks can outlive the loss of their node.  No torch.

Rank 0 of every start writes who it is into `lease.json`, and looks whether it is still named there before it declares a
checkpoint complete and before it removes anything.  Whoever is not named any more stops and touches nothing.
"""

import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megaroute.common.errors import LaunchError, LeaseLostError
from megaroute.common.files import atomic_write
from megaroute.common.log import get_logger

FILE = "lease.json"

log = get_logger(__name__)

_tokens: dict[int, str] = {}
"""By process id, since a forked process is another holder."""


@dataclass(frozen=True)
class Holder:
    """One start of a run: its rank 0."""

    host: str
    pid: int
    started: int
    """When the process started, in the kernel's ticks: a process id alone may have a new owner."""
    job: str
    """SLURM job id; empty outside SLURM."""
    restart: int
    """How many times SLURM has requeued the job."""
    token: str
    """Random: no two starts are mistaken for each other."""

    @classmethod
    def this_process(cls, environment: Mapping[str, str] = os.environ) -> "Holder":
        """Who this process is."""
        pid = os.getpid()
        token = _tokens.setdefault(pid, secrets.token_hex(8))
        job, restart = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), pid, _start_time(pid) or 0, job, int(restart or 0), token)

    def is_dead(self) -> bool:
        """Whether its process is known to be gone; of another host nothing is known."""
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        job = f"job {self.job} restart {self.restart}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


class Lease:
    """The right to write checkpoints below a folder.  On rank 0 only."""

    def __init__(self, root: Path, holder: Holder) -> None:
        self._file, self.holder = root / FILE, holder

    def check(self) -> None:
        """Raise LeaseLostError when another start of the run has taken over."""
        holder = _read(self._file)
        if holder is None or holder.token != self.holder.token:
            raise LeaseLostError(
                f"{self._file} names {holder or 'nobody'}, not {self.holder}: another start of this run has taken "
                "over, so this one stops without writing or removing a checkpoint; let the other one go on"
            )

    def release(self) -> None:
        """Give it back, if it is still ours; harmless when repeated."""
        holder = _read(self._file)
        if holder is not None and holder.token == self.holder.token:
            self._file.unlink(missing_ok=True)


def take(root: Path, holder: Holder | None = None) -> Lease:
    """Become the one that writes below `root`.

    A higher restart of the same job takes over, and so does any start from one whose process is dead, or on another
    host, where it cannot be asked: the older one finds out at its next save.  Raises LaunchError when the run is going
    on in another process of this host or in a later restart of this job, and when the folder cannot be written.
    """
    mine = holder or Holder.this_process()
    lease, text = Lease(root, mine), json.dumps(asdict(mine)) + "\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        before = _read(root / FILE)
        if before is None and _create(root / FILE, text):
            return lease
        before = before or _read(root / FILE)
        if before is not None:
            _refuse(root, before, mine)
            if before.token != mine.token:
                log.warning("%s: taking over from %s", root, before)
        atomic_write(root / FILE, text)
    except OSError as error:
        raise LaunchError(
            f"{root} cannot be written ({error.strerror}), so the run could not save checkpoints; set run.directory to "
            "a folder that you own on a disk with space"
        ) from error
    return lease


def check_free(root: Path) -> None:
    """Raise LaunchError when `take` would refuse; writes nothing."""
    before = _read(root / FILE)
    if before is not None:
        _refuse(root, before, Holder.this_process())


def _refuse(root: Path, before: Holder, mine: Holder) -> None:
    if before.token == mine.token or before.is_dead():
        return
    if before.job and before.job == mine.job and before.restart != mine.restart:
        if before.restart < mine.restart:
            return
        raise LaunchError(
            f"{root} belongs to {before}, a later restart than this one ({mine.restart}), so this one must not write "
            "there; let the later one go on"
        )
    if before.host == mine.host:
        raise LaunchError(
            f"run.directory: {root.parent} is in use by {before}, and two runs would mix their checkpoints; stop that "
            "one or wait for it, or choose another run.directory or run.name"
        )


def _create(path: Path, text: str) -> bool:
    """Write a file that must not exist yet; False when somebody was faster."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_text(text)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _read(path: Path) -> Holder | None:
    """Whom the file names; None when there is none, or none that can be read."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _start_time(pid: int) -> int | None:
    """Start of a process in ticks since boot (proc(5), field 22); None when there is none, or it is only not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
