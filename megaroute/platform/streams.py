"""Copies off the device beside what it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A queue of the device beside the one that computes.  On the CPU there are no queues."""

    def __init__(self, device: torch.device) -> None:
        """What will be queued comes after all that is queued for computing now."""
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queue here what the block asks for, in any thread, and wait for it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
