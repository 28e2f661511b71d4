"""torch.distributed's environment variables from SLURM's, for ranks that `srun` started."""

import os
import subprocess
from collections.abc import MutableMapping

from megaroute.common.errors import LaunchError

PORT_BASE = 29500
PORTS = 1000


def set_rank_environment(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in a SLURM task; True if it did.

    Call before the process group exists.  Needs no ssh, host file or MPI.  Outside SLURM it changes nothing, and where
    RANK is set already it only checks.  Raises LaunchError when WORLD_SIZE is not SLURM_NTASKS, since the tasks would
    then train several models side by side, and when SLURM's variables or `scontrol` are missing.
    """
    if "SLURM_PROCID" not in environment:
        return False
    if "TORCHELASTIC_RUN_ID" in environment:
        _check_agents(environment)
        return False
    if "RANK" in environment:
        _check_world_size(environment)
        return False
    if "SLURM_STEP_ID" not in environment and environment.get("SLURM_NTASKS", "1") != "1":
        raise LaunchError(
            f"this is a batch script with {environment['SLURM_NTASKS']} tasks, and no task of srun: it would wait for "
            "the others for ever; put srun in front, or use megaroute launch"
        )
    ranks = {
        "RANK": _task_variable(environment, "SLURM_PROCID"),
        "WORLD_SIZE": _task_variable(environment, "SLURM_NTASKS"),
        "LOCAL_RANK": _task_variable(environment, "SLURM_LOCALID"),
    }
    _check_world_size({**environment, "WORLD_SIZE": environment.get("WORLD_SIZE", ranks["WORLD_SIZE"])})
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    port = environment.get("MASTER_PORT") or str(meeting_port(environment))
    environment.update(ranks, MASTER_ADDR=address, MASTER_PORT=port)
    return True


def _check_world_size(environment: MutableMapping[str, str]) -> None:
    world_size, tasks = environment.get("WORLD_SIZE"), environment.get("SLURM_NTASKS")
    if tasks is not None and world_size != tasks:
        raise LaunchError(
            f"WORLD_SIZE is {world_size}, but SLURM started {tasks} tasks (SLURM_NTASKS): they would not be one run; "
            "start the ranks with one srun, or unset WORLD_SIZE"
        )


def _check_agents(environment: MutableMapping[str, str]) -> None:
    """torchrun numbers the ranks itself; srun starts one torchrun for each node."""
    agents, tasks = environment.get("GROUP_WORLD_SIZE"), environment.get("SLURM_NTASKS")
    if "SLURM_STEP_ID" in environment and tasks is not None and agents != tasks:
        raise LaunchError(
            f"torchrun has {agents} nodes, but SLURM started {tasks} tasks (SLURM_NTASKS), each with a torchrun: use "
            "srun --ntasks-per-node=1, and torchrun --nnodes with the number of nodes"
        )


def _task_variable(environment: MutableMapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value.isdigit():
        raise LaunchError(f"{name} is {value!r} in a SLURM task, must be a number; start the ranks with srun")
    return value


def meeting_port(environment: MutableMapping[str, str]) -> int:
    """Port of the ranks' first meeting, by job and restart."""
    # The restart count is in it so that a rank of the job's previous life, still alive on a node that SLURM lost
    # sight of, cannot join the new group.
    job = int(_task_variable(environment, "SLURM_JOB_ID"))
    restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
    return PORT_BASE + (job + 101 * restart) % PORTS


def _first_host(environment: MutableMapping[str, str]) -> str:
    return hosts(environment)[0]


def hosts(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Host names of the SLURM step (or job), in rank order.  Raises LaunchError when `scontrol` cannot tell."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise LaunchError("neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set; start the ranks with srun")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError:
        raise LaunchError("scontrol is not on PATH, so the first host is not known; set MASTER_ADDR") from None
    except subprocess.SubprocessError as error:
        raise LaunchError(f"{' '.join(command)} failed ({error}); set MASTER_ADDR") from None
    return shown.stdout.split()
