"""The check of a node before a run starts on it: `srun` runs this once per node; it says what is wrong and exits 1.

python -m megaroute.launch.health RUNDIR FOLDER DEVICE
"""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megaroute.common.files import write_json
from megaroute.launch import devices, slurm_env

DISK_BYTES = 1 << 30
MEMORY_BYTES = 1 << 30
CLOCK_S = 30.0
WAIT_S = 60.0
"""Seconds that a node waits for the others to say where they listen."""


def main(argv: Sequence[str]) -> int:
    """Check this node and write its problems into FOLDER; 1 if there are any."""
    run_dir, folder, device = Path(argv[0]), Path(argv[1]), argv[2]
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problems = [
        *disk(run_dir),
        *disk(Path(os.environ.get("TMPDIR", "/tmp"))),
        *memory(),
        *visible(device),
        *clock(folder),
    ]
    with socket.create_server(("", 0)) as listener:
        report: dict[str, Any] = {"port": listener.getsockname()[1], "problems": problems, "unreachable": []}
        write_json(folder / f"{host}.json", report)
        report["unreachable"] = peers(folder, slurm_env.hosts())
        write_json(folder / f"{host}.json", report)
        _wait_for_all(folder, len(slurm_env.hosts()))
    for problem in problems:
        print(f"megaroute: unhealthy: {host}: {problem}", file=sys.stderr)
    return int(bool(problems))


def disk(path: Path) -> list[str]:
    """Problems of the file system that `path` is on: full, or not writable."""
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < DISK_BYTES:
        return [f"{path} has {free / 2**20:,.0f} MiB free, a run needs at least {DISK_BYTES >> 20:,}"]
    return [] if os.access(path, os.W_OK) else [f"{path} cannot be written to"]


def memory() -> list[str]:
    """Problems of the memory that is left: somebody's dead job may hold it."""
    free = psutil.virtual_memory().available
    return (
        []
        if free >= MEMORY_BYTES
        else [f"{free / 2**20:,.0f} MiB of memory available, less than {MEMORY_BYTES >> 20:,}"]
    )


def visible(device: str) -> list[str]:
    """Problems of the devices: fewer than the tasks of this node."""
    tasks = int(os.environ.get("MEGAROUTE_TASKS_PER_NODE", "1"))
    if device == "cpu" or len(devices.device_ids()) >= tasks:
        return []
    return [f"{len(devices.device_ids())} devices visible for {tasks} tasks"]


def clock(folder: Path) -> list[str]:
    """Problems of the clock, against that of the file server, which dates a file that this node writes."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("")
        apart = time.time() - probe.stat().st_mtime
    except OSError as error:
        return [f"{folder} cannot be written to: {error.strerror}"]
    finally:
        with suppress(OSError):
            probe.unlink()
    return [f"the clock is {apart:+.0f} s away from the file server's"] if abs(apart) > CLOCK_S else []


def peers(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Hosts that do not say where they listen, or cannot be reached there."""
    unreachable = []
    end = time.monotonic() + WAIT_S
    for host in hosts:
        port = _port(folder / f"{host}.json", end)
        try:
            if port is None:
                raise OSError
            socket.create_connection((host, port), timeout=10).close()
        except OSError:
            unreachable.append(host)
    return unreachable


def bad_hosts(folder: Path, hosts: Sequence[str]) -> dict[str, str]:
    """{host: problem} after the check; a node that most others cannot reach is the bad one, not they."""
    bad: dict[str, str] = {}
    missed: dict[str, int] = {}
    for host in hosts:
        report = _read(folder / f"{host}.json")
        if report is None:
            bad[host] = "it did not answer"
        elif report["problems"]:
            bad[host] = "; ".join(report["problems"])
        for other in (report or {}).get("unreachable", []):
            missed[other] = missed.get(other, 0) + 1
    for host, count in missed.items():
        if 2 * count > len(hosts) - 1 and len(hosts) > 2:
            bad.setdefault(host, f"{count} of {len(hosts) - 1} nodes cannot reach it")
    return bad


def unreached(folder: Path, hosts: Sequence[str]) -> list[str]:
    """ "a cannot reach b", for every pair."""
    reports = {host: _read(folder / f"{host}.json") for host in hosts}
    return [
        f"{host} cannot reach {other}"
        for host, report in reports.items()
        for other in (report or {}).get("unreachable", [])
    ]


def _port(path: Path, end: float) -> int | None:
    while (report := _read(path)) is None:
        if time.monotonic() > end:
            return None
        time.sleep(0.2)
    return int(report["port"])


def _wait_for_all(folder: Path, count: int, seconds: float = 15.0) -> None:
    """Keep listening until every node has tried."""
    (folder / f"done-{os.environ.get('SLURM_NODEID', '0')}").touch()
    end = time.monotonic() + seconds
    while len(list(folder.glob("done-*"))) < count and time.monotonic() < end:
        time.sleep(0.1)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
