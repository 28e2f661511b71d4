"""What each rank is doing, told by its main thread at no cost and written down for the other ranks by its watchdog."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

HANG, FAILURE = "hang", "failure"
"""Kinds of trouble."""

SLOW = ("set-up", "save", "rollback", "report")
"""Phases that get SLOW_FACTOR times as long as others; so does the first step, which may compile."""
SLOW_FACTOR = 2


class Pulse:
    """What the main thread is doing, and when it last got on with it."""

    def __init__(self) -> None:
        self.phase, self.step, self.steps_begun = "set-up", 0, 0
        self.since = self.moved = time.monotonic()

    def enter(self, phase: str, step: int | None = None) -> None:
        """A new phase begins; `step`, from 1, when it belongs to another step than the phase before."""
        self.since = self.moved = time.monotonic()
        if step is not None:
            self.steps_begun += 1
            self.step = step
        self.phase = phase

    def beat(self) -> None:
        """The phase gets on."""
        self.moved = time.monotonic()

    def excuse(self, seconds: float) -> None:
        """The process was stopped for so long, and could not have got on."""
        self.moved = min(self.moved + seconds, time.monotonic())

    def follow(self, modules: Iterable[torch.nn.Module]) -> None:
        """Beat whenever one of `modules` starts a forward pass, which is once a micro-batch and pipeline chunk."""
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.beat())

    def overdue(self, timeout_s: float) -> bool:
        """Whether nothing has moved for longer than the phase may take."""
        slow = self.phase in SLOW or self.steps_begun <= 1
        return time.monotonic() - self.moved > timeout_s * (SLOW_FACTOR if slow else 1)


@dataclass(frozen=True)
class Beat:
    """What the others know of a rank."""

    rank: int
    host: str
    phase: str
    step: int
    still_s: float
    """Seconds since it last got on, when this was written."""
    written: float
    """When, by its host's clock."""
    place: str = ""
    """Where its main thread is, once the run is found to hang."""
    waits: bool = False
    """Whether that is a wait for other ranks."""

    @property
    def doing(self) -> str:
        """`step 17, read`."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    @property
    def who(self) -> str:
        """`rank 3 on node7`."""
        return f"rank {self.rank} on {self.host}"


class Board:
    """A folder with a small file of each rank, and one for the trouble that ends the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, beat: Beat) -> None:
        """Replace a rank's file."""
        self._replace(f"rank-{beat.rank:05d}.json", asdict(beat))

    def read(self) -> dict[int, Beat]:
        """What the ranks wrote last."""
        beats = [Beat(**value) for path in self.folder.glob("rank-*.json") if (value := _json(path))]
        return {beat.rank: beat for beat in beats}

    def declare(self, trouble: dict[str, Any]) -> bool:
        """Tell all ranks to end, and why: `kind`, `rank`, `message`; False if another rank was first."""
        beside = self._write(f"trouble-{trouble['rank']}", trouble)
        try:
            os.link(beside, self.folder / "trouble.json")  # whole, and once
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def trouble(self) -> dict[str, Any] | None:
        """What was declared."""
        return _json(self.folder / "trouble.json")

    @property
    def hangs(self) -> bool:
        """Whether the trouble is that nothing moves."""
        return (self.trouble() or {}).get("kind") == HANG

    def close_case(self) -> None:
        """Say that the trouble is written down, and nobody has to wait any longer."""
        (self.folder / "reported").touch()

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return (self.folder / "reported").exists()

    def _replace(self, name: str, value: dict[str, Any]) -> None:
        os.replace(self._write(name, value), self.folder / name)

    def _write(self, name: str, value: dict[str, Any]) -> Path:
        path = self.folder / f".{name}.tmp"
        path.write_text(json.dumps(value))  # no fsync: it is worth nothing once the machine is gone
        return path


def new_folder(run_dir: Path) -> Path:
    """A folder for the heartbeats of one start of a run, in place of those of earlier starts.

    It has a name of its own: ranks of an earlier start may live on a node that was lost, and must not end this one.
    """
    root = run_dir / "heartbeats"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
    folder.mkdir(parents=True)
    return folder


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
