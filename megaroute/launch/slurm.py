"""What a batch job knows of itself, and what it asks SLURM to do."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaroute.common.errors import LaunchError
from megaroute.launch import slurm_env

TRIES = 12
AGAIN_S = 5.0
"""How often, and how many seconds apart, SLURM's controller is asked when it may just be restarting."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, and how many ranks each of them gets."""

    job: str
    restart: int
    hosts: tuple[str, ...]
    tasks_per_node: int

    @property
    def processes(self) -> int:
        """Ranks of a run on the whole allocation."""
        return len(self.hosts) * self.tasks_per_node

    @property
    def name(self) -> str:
        """A name that no other start of any job has."""
        return f"{self.job}.{self.restart}"


def in_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process has nodes to start ranks on: a batch script, or a shell of salloc, but no task of srun."""
    return "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment


def allocation(environment: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation that SLURM's variables describe.

    Raises LaunchError when the number of tasks per node is not known or differs between nodes.
    """
    hosts = tuple(slurm_env.hosts(dict(environment)))
    return Allocation(
        job=environment["SLURM_JOB_ID"],
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        hosts=hosts,
        tasks_per_node=_tasks_per_node(environment, len(hosts)),
    )


def _tasks_per_node(environment: Mapping[str, str], nodes: int) -> int:
    given = environment.get("SLURM_NTASKS_PER_NODE")
    if given is not None and given.isdigit():
        return int(given)
    tasks = environment.get("SLURM_NTASKS")
    if tasks is not None and tasks.isdigit() and int(tasks) % nodes == 0:
        return int(tasks) // nodes
    devices = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE", "").rpartition(":")[2]
    if devices.isdigit() and int(devices) > 0:
        return int(devices)
    raise LaunchError(
        f"the job has {nodes} nodes and SLURM_NTASKS is {tasks}: every node must get the same number of tasks, one per "
        "device; submit with --ntasks-per-node"
    )


def srun(allocation: Allocation, tasks_per_node: int, *options: str) -> list[str]:
    """`srun` of a step on all nodes, consecutive ranks on one node; one failing task ends the others."""
    total = len(allocation.hosts) * tasks_per_node
    counts = [f"--nodes={len(allocation.hosts)}", f"--ntasks={total}", f"--ntasks-per-node={tasks_per_node}"]
    return ["srun", *counts, "--distribution=block", "--kill-on-bad-exit=1", "--export=ALL", *options]


RESTARTED = "RESTARTED"
"""Not a word of SLURM's: the job runs, or waits, as a later start of it."""


def job_state(job: str, restart: int) -> str:
    """SLURM's word for the state of a job, such as RUNNING or CANCELLED; "" when it does not say.

    RESTARTED when SLURM has started the job more often than `restart` times again, so that it is no longer ours.
    """
    words = _scontrol("show", "job", job).stdout.split()
    fields = {name: value for name, _, value in (word.partition("=") for word in words)}
    restarts = fields.get("Restarts", "")
    return RESTARTED if restarts.isdigit() and int(restarts) > restart else fields.get("JobState", "")


def requeue(job: str, restart: int, exclude: Sequence[str] = ()) -> str:
    """Send this start of a job back to the queue, away from the nodes `exclude`; SLURM's objection, "" if none.

    SLURM ends the batch script at once, with SIGTERM, so the caller must ignore that.  Nodes can be excluded only
    while a job is pending, that is from now to the SIGKILL that follows.
    """
    for number in range(TRIES):
        asked = _scontrol("requeue", job)
        if asked.returncode == 0:
            break
        # A controller that is away does not tell the state either.
        if number == TRIES - 1 or "disabled" in asked.stderr or job_state(job, restart) not in ("RUNNING", ""):
            return asked.stderr.strip() or "scontrol requeue failed"
        time.sleep(AGAIN_S)
    for _ in range(20 if exclude else 0):
        if _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}").returncode == 0:
            break
        time.sleep(0.25)
    return ""


def _scontrol(*words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))
