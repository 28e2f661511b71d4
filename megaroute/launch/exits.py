"""How a run ended, from what each rank says: launchers lose the exit codes of ranks, and srun mixes them.

A rank writes its code and, when it failed, a sentence into a file of its own in a folder that the launcher names.
Ranks that were killed write nothing, and that is known too.
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaroute.common.errors import MegarouteError
from megaroute.common.exit_codes import BAD_INPUT, FAILED, FINISHED, HUNG, LOST, STOPPED
from megaroute.common.files import write_json

FOLDER = "MEGAROUTE_EXITS"
"""Environment variable: the folder for the files."""

Ending = Literal["finished", "stopped", "hung", "failed", "bad input", "died"]

_GONE = re.compile(
    r"connection (closed|reset|refused)|lost its connection|remote process exited|broken pipe|timed out|"
    r"socket|NCCL|CUDA error|ECC|Input/output error|Stale file handle",
    re.I,
)
"""Words of an error whose cause is another rank, a network or a device, and not this program."""


def folder_of(run_dir: Path, start: str) -> Path:
    """Where the ranks of one start of a job, `Allocation.name`, write how they ended."""
    return run_dir / "exits" / start


@dataclass(frozen=True)
class Outcome:
    """How one start of a run ended."""

    ending: Ending
    why: str
    """A sentence; "" after a run that finished."""
    code: int
    """Exit code that says the same."""


@contextmanager
def recorded() -> Iterator[list[int]]:
    """In a rank: write how the block ends, where a launcher asked for it.  The block appends the code it returns."""
    codes: list[int] = []
    try:
        yield codes
    except SystemExit as error:
        write(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise
    except Exception as error:
        write(code_of(error), " ".join(f"{_name(error)}{error}".split())[:400])
        raise
    write(codes[-1] if codes else FINISHED)


def code_of(error: Exception) -> int:
    """LOST when another rank, the network or a device is to blame, else the error's own code or FAILED."""
    if isinstance(error, MegarouteError):
        return LOST if error.exit_code == FAILED and _GONE.search(str(error)) else error.exit_code
    return LOST if isinstance(error, RuntimeError | OSError) and _GONE.search(str(error)) else FAILED


def write(code: int, why: str = "") -> None:
    """Note this rank's exit code; the first note of a rank counts.  Does nothing without a folder, or a disk."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    path = Path(folder) / f"rank-{int(os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0):05d}.json"
    if not path.exists():
        with suppress(OSError):
            write_json(path, {"code": code, "host": socket.gethostname(), "why": why}, indent=None)


def process_code(code: int) -> int:
    """The exit status for a rank that wrote `code`: srun takes any but 0 for a crash and ends the other ranks at once,
    so one that stopped in order says so in its file only, where there is a launcher to read it."""
    return FINISHED if code == STOPPED and FOLDER in os.environ else code


def outcome(folder: Path, processes: int, status: int) -> Outcome:
    """How a start of `processes` ranks ended, from their files and the `status` of the command that started them.

    What must not be tried again outweighs the rest.  A rank without a file was killed, with its node or by whoever
    ends the ranks after the first failure.
    """
    said = _read(folder)
    for code, ending in ((BAD_INPUT, "bad input"), (FAILED, "failed"), (HUNG, "hung")):
        for rank, note in sorted(said.items()):
            if note["code"] == code:
                return _outcome(ending, f"rank {rank} on {note['host']}: {note['why'] or ending}")
    codes = {note["code"] for note in said.values()}
    if status == HUNG:
        return _outcome("hung", "a step did not end in time; log.txt has the stacks of all ranks")
    if len(said) == processes and codes == {STOPPED}:
        return _outcome("stopped", "asked to stop, and saved")
    if len(said) == processes and codes == {FINISHED}:
        return _outcome("finished", "")
    if not said and status in (BAD_INPUT, FAILED):
        return _outcome("bad input" if status == BAD_INPUT else "died", f"no rank came up (exit status {status})")
    return _outcome("died", _who_died(said, processes, status))


def _who_died(said: dict[int, dict[str, Any]], processes: int, status: int) -> str:
    silent = [rank for rank in range(processes) if rank not in said]
    if silent:
        named = ", ".join(map(str, silent[:8])) + (", .." if len(silent) > 8 else "")
        return (
            f"rank{'s' if len(silent) > 1 else ''} {named} of {processes} ended without a word (exit status {status})"
        )
    lost = next((note for note in said.values() if note["code"] == LOST), None)
    return str(lost["why"]) if lost else f"ranks ended with {sorted({str(note['code']) for note in said.values()})}"


def _outcome(ending: str, why: str) -> Outcome:
    codes: dict[str, tuple[Ending, int]] = {
        "finished": ("finished", FINISHED),
        "stopped": ("stopped", STOPPED),
        "hung": ("hung", HUNG),
        "failed": ("failed", FAILED),
        "bad input": ("bad input", BAD_INPUT),
        "died": ("died", LOST),
    }
    return Outcome(codes[ending][0], why, codes[ending][1])


def _read(folder: Path) -> dict[int, dict[str, Any]]:
    said = {}
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError, ValueError):
            said[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    return said


def _name(error: Exception) -> str:
    return "" if isinstance(error, MegarouteError) else f"{type(error).__name__}: "
