"""Start the ranks of a distributed test, wait with a timeout, and leave no process behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": paths,
        "PYTHONWARNINGS": "ignore",
    }


def run_ranks(
    script: Path, world_size: int, spec: dict, folder: Path, timeout_s: float, outside_launcher: bool = False
) -> list[dict]:
    """Run `script spec.json out.json` on every rank; returns what each wrote.  A rank that hangs is a failure.

    With `outside_launcher` the one rank finds no RANK in its environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    port, processes = free_port(), []
    try:
        for rank in range(world_size):
            command = [sys.executable, str(script), str(folder / "spec.json"), str(folder / f"out-{rank}.json")]
            environment = rank_environment(rank, world_size, port)
            if outside_launcher:
                del environment["RANK"]
            with open(folder / f"log-{rank}.txt", "w") as log:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        _wait(processes, folder, timeout_s)
    finally:
        for process in processes:
            _end(process)
    return [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        logs = "\n".join(f"--- rank {r}\n{(folder / f'log-{r}.txt').read_text()[-3000:]}" for r in range(len(codes)))
        raise AssertionError(f"ranks ended with {codes} (None: still running after {timeout_s} s)\n{logs}")


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what a rank started, such as a checkpoint writer
    process.wait()
