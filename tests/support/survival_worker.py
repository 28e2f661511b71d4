"""A run that is killed: `python survival_worker.py spec.json out.json`.

Imports once, then forks a process for every start of the run, which trains from its newest checkpoint to the end.  A
start with a number n kills itself with SIGKILL just before its n-th operation on files below `checkpoints`, as the
interpreter announces them to audit hooks, or after n seconds.  Random moments are within the time that a whole run
takes here; a run that ends before its moment is recorded with its losses, and the next one begins from nothing.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}


def kill_before(number: int, root: str) -> None:
    """From now on count operations that change files below `root`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in OPERATIONS:
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        # shutil.rmtree names what it removes relative to an open folder; nothing else in a run does.
        relative = event in ("os.remove", "os.rmdir") and arguments[1] not in (None, -1)
        if relative or str(arguments[0]).startswith(root):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(spec: dict[str, Any], out: Path, before: int | None, after_s: float | None) -> None:
    """One start of the run, to its end."""
    import torch

    from megaroute.config.load import load_config
    from megaroute.training import pretrain

    torch.set_num_threads(1)
    config = load_config(Path(spec["config"]), spec["overrides"])
    if before is not None:
        kill_before(before, str(config.run_directory / "checkpoints"))
    if after_s is not None:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    code = pretrain.main(config)
    out.write_text(json.dumps(code))


def start(spec: dict[str, Any], out: Path, before: int | None = None, after_s: float | None = None) -> int:
    """Exit status of one start: -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(spec, out, before, after_s)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_of(root: Path) -> list[str]:
    """Names of complete checkpoints, every byte of which is as it was written."""
    from megaroute.checkpoint.integrity import verify
    from megaroute.checkpoint.layout import complete_checkpoints

    complete = complete_checkpoints(root)
    for path in complete:
        verify(path)
    return [path.name for path in complete]


def main() -> None:
    spec_file, out_file = map(Path, sys.argv[1:])
    spec = json.loads(spec_file.read_text())
    from megaroute.config.load import load_config
    from megaroute.training import pretrain  # noqa: F401  imported once, for all starts

    run = load_config(Path(spec["config"]), spec["overrides"]).run_directory

    def recorded(**kill: Any) -> dict[str, Any]:
        code = start(spec, out_file, **kill)
        losses = losses_of(run) if code == 0 else None
        return {**kill, "code": code, "complete": state_of(run / "checkpoints"), "losses": losses}

    starts = [recorded(before=number) for number in spec["before"]]
    starts += randomly_killed(spec["random"], run, recorded)
    starts.append(recorded())
    out_file.write_text(json.dumps(starts))


def randomly_killed(times: int, run: Path, recorded: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """Starts until so many were killed, of as many runs as that takes."""
    if not times:
        return []
    draw, starts = random.Random(1), []
    began = time.monotonic()
    recorded()
    length = time.monotonic() - began
    shutil.rmtree(run)
    while sum(each["code"] != 0 for each in starts) < times:
        starts.append(recorded(after_s=draw.uniform(0.0, length)))
        if starts[-1]["code"] == 0:
            shutil.rmtree(run)
    return starts


def losses_of(run: Path) -> list[float]:
    from megaroute.metrics.history import read_history

    return [record.loss for record in read_history(run / "metrics.jsonl").train]


if __name__ == "__main__":
    main()
