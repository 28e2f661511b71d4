"""Which device a run will find on this machine, without importing torch."""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

from megaroute.common.errors import LaunchError

Device = Literal["cpu", "cuda"]
VISIBLE = "CUDA_VISIBLE_DEVICES"


def detect_device(wanted: Literal["auto", "cpu", "cuda"] = "auto") -> Device:
    """The device that `run.device` means here: `auto` is CUDA where there is an NVIDIA device and torch can use it.

    Raises LaunchError when CUDA is asked for and absent.
    """
    if wanted == "cpu":
        return "cpu"
    found = device_ids() if _torch_has_cuda() else []
    if found:
        return "cuda"
    if wanted == "cuda":
        reason = (
            f"torch {_torch_version()} is a build for the CPU"
            if device_ids()
            else "this machine shows no NVIDIA device"
        )
        raise LaunchError(f"run.device is cuda, but {reason}; use run.device=cpu or another machine")
    return "cpu"


def device_ids() -> list[str]:
    """Devices a process may use, by the names CUDA knows them by: those of CUDA_VISIBLE_DEVICES if set, else all."""
    present = [str(index) for index in range(_count_devices())]
    visible = os.environ.get(VISIBLE)
    if visible is None or not present:
        return present
    return [name for name in (part.strip() for part in visible.split(",")) if name and name != "-1"]


def hide_devices(environment: MutableMapping[str, str]) -> None:
    """Let a process that is to compute on the CPU see no CUDA device; before torch is imported.

    DeepSpeed's launcher numbers the processes of a CPU run in CUDA_VISIBLE_DEVICES, which would show them the devices.
    """
    environment[VISIBLE] = ""


def _count_devices() -> int:
    nodes = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    if nodes or shutil.which("nvidia-smi") is None:
        return len(nodes)
    try:  # where devices have no node of their own, as under WSL
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in shown.stdout.splitlines())


def _torch_has_cuda() -> bool:
    return not _torch_version().endswith("+cpu")


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError("torch is not installed in this environment; install megaroute as the README says") from None
