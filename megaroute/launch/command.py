"""Configuration -> command and environment of DeepSpeed's launcher on this machine."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaroute.common.errors import LaunchError
from megaroute.config.root import Config
from megaroute.launch.devices import VISIBLE, Device, device_ids

_FROM_OTHER_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID"),
)
"""Variables that would tell a rank of this run that it belongs to another one, such as an allocation's shell."""


PREFLIGHT_DONE = "MEGAROUTE_PREFLIGHT_DONE"
"""Tells ranks that their launcher has checked everything and made the run directory."""


@dataclass(frozen=True)
class Launch:
    """A command, and the variables that differ from those of this process: None stands for a variable left out."""

    argv: tuple[str, ...]
    variables: Mapping[str, str | None]

    def environment(self) -> dict[str, str]:
        """The whole environment of the command."""
        merged = {**os.environ, **self.variables}
        return {name: value for name, value in merged.items() if value is not None}

    def shell_line(self) -> str:
        """The same as one line for a shell."""
        unset = [word for name, value in self.variables.items() if value is None for word in ("-u", name)]
        given = [f"{name}={value}" for name, value in self.variables.items() if value is not None]
        return shlex.join(["env", *unset, *given, *self.argv])


def num_processes(config: Config, nproc: int | None = None) -> int:
    """Processes of a local run: `nproc` when given, else tensor * pipeline * data, where data `auto` is one replica."""
    if nproc is not None:
        return nproc
    return config.parallel.model_size * (1 if config.parallel.data == "auto" else config.parallel.data)


def local_launch(config_file: Path, processes: int, device: Device) -> Launch:
    """How DeepSpeed's runner starts `processes` ranks of `megaroute pretrain config_file` on this machine.

    Raises LaunchError when there are fewer CUDA devices than processes.
    """
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--hostfile", os.devnull]
    runner += [*_slots(processes, device), "--master_port", str(free_port())]
    rank = ["--no_local_rank", "--module", "megaroute.cli", "pretrain", str(config_file.resolve())]
    return Launch((*runner, *rank, f"run.device={device}"), _variables(processes, device))


def by_hand(launch: Launch, config_file: Path, overrides: Sequence[str]) -> Launch:
    """The same for a person to type: it reads what the person wrote, and its ranks check and make the run directory."""
    at = launch.argv.index("pretrain") + 1
    argv = (*launch.argv[:at], str(config_file.resolve()), *overrides, *launch.argv[at + 1 :])
    return Launch(argv, {name: value for name, value in launch.variables.items() if name != PREFLIGHT_DONE})


def free_port() -> int:
    """A TCP port that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _slots(processes: int, device: Device) -> list[str]:
    if device == "cpu":
        return ["--num_accelerators", str(processes)]
    ids = device_ids()
    if processes > len(ids):
        raise LaunchError(
            f"the run needs {processes} processes, one per device, but this machine shows {len(ids)}; lower "
            "parallel.tensor, parallel.pipeline or parallel.data, or use run.device=cpu"
        )
    if not all(name.isdigit() for name in ids):
        raise LaunchError(f"{VISIBLE}={','.join(ids)}: DeepSpeed's launcher takes device numbers only; give numbers")
    # By number and not by count: the runner drops CUDA_VISIBLE_DEVICES when it is given a count.
    return ["--include", f"localhost:{','.join(ids[:processes])}"]


def _variables(processes: int, device: Device) -> dict[str, str | None]:
    variables: dict[str, str | None] = dict.fromkeys((*_FROM_OTHER_LAUNCHERS, VISIBLE))
    variables["DS_ACCELERATOR"] = device
    variables[PREFLIGHT_DONE] = "1"
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, _cores() // processes))
    return {name: value for name, value in variables.items() if value is not None or name in os.environ}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
