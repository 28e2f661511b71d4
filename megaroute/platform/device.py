"""Which device computes and which backend communicates.  The only place that names either."""

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megaroute.common.errors import ConfigError

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Platform:
    """The device of this process, and the backend of its collectives."""

    device: torch.device
    backend: Backend

    @property
    def on_cpu(self) -> bool:
        """Whether tensors live on the CPU."""
        return self.device.type == "cpu"

    @property
    def name(self) -> str:
        """Name of the device as a data sheet has it, or "cpu"."""
        return "cpu" if self.on_cpu else torch.cuda.get_device_name(self.device)

    def upload(self, array: np.ndarray) -> Tensor:
        """The array on the device.  Off the CPU it goes through pinned memory, and the copy runs beside the host."""
        tensor = torch.from_numpy(array)
        return tensor if self.on_cpu else tensor.pin_memory().to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the device is done with what was queued; for timing."""
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)


def resolve(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """The platform that `run.device` asks for; on CUDA the process takes the device of its LOCAL_RANK.

    Raises ConfigError when CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("run.device is cuda, but torch sees no CUDA device; use run.device=cpu or a node with a GPU")
    if device == "cpu" or not available:
        return Platform(torch.device("cpu"), "gloo")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return Platform(torch.device("cuda", index), "nccl")
