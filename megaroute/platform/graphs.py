"""Work of fixed shapes, recorded once and replayed without the host."""

from collections.abc import Callable

import torch

from megaroute.common.errors import ConfigError
from megaroute.platform.device import Platform

WARM_UP = 3
"""Runs before the recording: kernels are chosen and compiled in them, which must not happen while recording."""


def recorded(run: Callable[[], None], platform: Platform) -> Callable[[], None]:
    """A function that does again what `run` did on the device: the same kernels on the same memory, as a CUDA graph.

    `run` must not wait for the device, and its shapes must not depend on values.  Tensors that it reads from outside
    may be filled anew between replays.  Raises ConfigError on a CPU.
    """
    if platform.on_cpu:
        raise ConfigError("run.device is cpu, but only work on a CUDA device can be recorded; use run.device=cuda")
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
