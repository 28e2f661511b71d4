"""`megaroute launch` inside a SLURM allocation: DeepSpeed's runner on all of its nodes, and what it needs to do that.

megaroute launch                 notes signals, reads exit codes
  deepspeed.launcher.runner      own session; knows the nodes from the host file in the run directory
    srun, mpirun or pdsh         passes SIGUSR1 on to the ranks
      rank.py on every node
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil

from megaroute.common.errors import LaunchError
from megaroute.common.exit_codes import LOST
from megaroute.common.files import atomic_write
from megaroute.common.log import get_logger
from megaroute.launch import exits, local, rank, slurm, status
from megaroute.launch.command import PREFLIGHT_DONE, Launch
from megaroute.launch.devices import Device
from megaroute.launch.slurm_env import meeting_port

Launcher = Literal["local", "slurm", "openmpi", "mpich", "pdsh"]
LAUNCHERS: tuple[Launcher, ...] = ("local", "slurm", "openmpi", "mpich", "pdsh")
NEEDS = {"slurm": "srun", "openmpi": "ompi_info", "mpich": "mpirun", "pdsh": "pdsh"}
HOST_FILE = "hostfile"
_AGAIN_S = 5.0
_PASS_ON = {"srun", "mpirun", "mpiexec", "mpiexec.hydra", "prterun"}

log = get_logger(__name__)


def cluster_launch(
    config_file: Path, run_dir: Path, allocation: slurm.Allocation, launcher: Launcher, device: Device
) -> Launch:
    """The command of DeepSpeed's runner for all tasks of the allocation.  The host file must be written first.

    Without `--force_multi` the runner would start everything on this node when there is only one, and without
    `--no_ssh_check --master_addr` it would ask the first node by ssh.  It drops `--module`, so ranks are a script.
    """
    first = allocation.hosts[0]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--force_multi"]
    runner += ["--hostfile", str((run_dir / HOST_FILE).absolute()), "--no_ssh_check", "--master_addr", first]
    runner += ["--master_port", str(meeting_port(os.environ)), "--launcher", launcher, "--no_local_rank"]
    options = _launcher_options(allocation, launcher)
    if options:
        runner.append(f"--launcher_args={options}")
    variables = {
        exits.FOLDER: str(exits.folder_of(run_dir, allocation.name).absolute()),
        rank.PROCESSES: str(allocation.processes),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(meeting_port(os.environ)),
        "DS_ACCELERATOR": device,
    }
    words = [f"{name}={value}" for name, value in variables.items()]
    argv = [*runner, str(Path(rank.__file__)), *words, "pretrain", str(config_file.resolve()), f"run.device={device}"]
    environment: dict[str, str | None] = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    environment |= {"SLURM_EXPORT_ENV": None, PREFLIGHT_DONE: "1", "DS_ACCELERATOR": device}
    known = {name: value for name, value in environment.items() if value is not None or name in os.environ}
    return Launch(tuple(argv), known)


def check_launcher(launcher: Launcher, inside: bool) -> None:
    """Raise LaunchError when a launcher for several nodes has no allocation to use, or its program is missing."""
    if launcher == "local":
        return
    if not inside:
        raise LaunchError(
            f"--launcher {launcher} needs the nodes of a SLURM allocation, and this process is in none; use sbatch or "
            "salloc, or --launcher local"
        )
    with_path = [Path(folder) / NEEDS[launcher] for folder in os.environ.get("PATH", "").split(os.pathsep)]
    if not any(os.access(path, os.X_OK) for path in with_path):
        raise LaunchError(f"--launcher {launcher} needs {NEEDS[launcher]} on PATH, which is not there")


def write_host_file(run_dir: Path, allocation: slurm.Allocation) -> None:
    """The nodes for DeepSpeed's runner, into the run directory."""
    atomic_write(run_dir / HOST_FILE, host_lines(allocation))


def host_lines(allocation: slurm.Allocation) -> str:
    """One line for each node: its name and its number of ranks."""
    return "".join(f"{host} slots={allocation.tasks_per_node}\n" for host in allocation.hosts)


def run(launch: Launch, run_dir: Path, allocation: slurm.Allocation, grace_s: float) -> int:
    """Run to the end, keep `status.json`, and return the exit code that the ranks agree on."""
    folder = exits.folder_of(run_dir, allocation.name)
    folder.mkdir(parents=True, exist_ok=True)
    for note in folder.glob("rank-*.json"):
        note.unlink()  # of an earlier launch in the same allocation
    attempt = status.Attempt(
        *(allocation.job, allocation.restart, allocation.hosts, status.now(), status.checkpoint_step(run_dir))
    )
    before = status.read(run_dir) or status.Status("queued")
    begun = replace(before, state="running", why="", job=allocation.job, restart=allocation.restart)
    begun = replace(begun, hosts=allocation.hosts, started=status.now(), attempts=(*before.attempts, attempt))
    status.write(run_dir, begun)
    code = _supervise(launch, grace_s, lambda: status.keep(run_dir, begun))
    found = exits.outcome(folder, allocation.processes, code)
    states: dict[str, status.State] = {"finished": "finished", "failed": "failed", "bad input": "failed"}
    ended = begun.ended(found, status.checkpoint_step(run_dir))
    status.keep(run_dir, replace(ended, state=states.get(found.ending, "stopped"), why=found.why))
    if found.why:
        log.log(logging.WARNING if found.ending == "stopped" else logging.ERROR, "%s: %s", found.ending, found.why)
    return (code or LOST) if found.ending == "died" else found.code


def _supervise(launch: Launch, grace_s: float, renew: Callable[[], object]) -> int:
    """Exit status of the runner; a signal asks the ranks to stop, a second one, or the end of the grace, ends them.

    `renew` is called every RENEW_S seconds.
    """
    asked: list[float] = []
    handler = lambda number, frame: asked.append(time.monotonic())  # noqa: E731
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored (nohup), it stays so
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    runner = subprocess.Popen(launch.argv, env=launch.environment(), start_new_session=True)
    try:
        ask_from, renew_from = 0.0, time.monotonic() + status.RENEW_S
        while runner.poll() is None:
            now = time.monotonic()
            if asked and now >= ask_from:
                ended = (len(asked) > 1 and asked[-1] - asked[0] > 1) or now - asked[0] > grace_s
                _signal_starters(runner.pid, signal.SIGTERM if ended else signal.SIGUSR1)
                ask_from = now + _AGAIN_S
            if now >= renew_from:
                renew()
                renew_from = now + status.RENEW_S
            time.sleep(0.1)
    finally:
        local.end_session(runner)
        for number, old in before.items():
            signal.signal(number, old)
    return runner.returncode if runner.returncode >= 0 else 128 - runner.returncode


def _signal_starters(session: int, number: int) -> None:
    """To srun or mpirun, which pass it on; nobody else in the session would survive it.  srun starts a second srun."""
    starters = [process for process in local.members(session) if process.name() in _PASS_ON]
    for process in starters:
        with suppress(psutil.Error):
            if process.ppid() not in {other.pid for other in starters}:
                process.send_signal(number)


def _launcher_options(allocation: slurm.Allocation, launcher: Launcher) -> str:
    more = os.environ.get("MEGAROUTE_LAUNCHER_ARGS", "")
    given = {
        # The runner counts tasks only: without the rest srun may put all of them on one node.
        "slurm": shlex.join(slurm.srun(allocation, allocation.tasks_per_node)[1:-1]),
        # The runner's own choice of interface, eth0, does not exist on many nodes.
        "openmpi": "--mca btl_tcp_if_include " + os.environ.get("GLOO_SOCKET_IFNAME", "lo,eth0").split(",")[-1],
    }.get(launcher, "")
    return f"{given} {more}".strip()
