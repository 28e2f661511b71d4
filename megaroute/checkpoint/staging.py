"""Copies of a rank's share of a checkpoint in host memory, made while training goes on to its next update.

Weights and optimizer state change with an update and at no other time.  So a thread copies them beside the forward and
backward pass of the next step, and only the update waits for it.  Everything else, which is small, is copied at once.
"""

import pickle
import threading
from collections.abc import Iterable

import torch

from megaroute.checkpoint.writer import Item, Share
from megaroute.platform.streams import SideStream

_Place = tuple[str, tuple[int, ...]]


class Copy:
    """A share that is being copied; `make` makes it, in any thread, and `wait` waits for that."""

    def __init__(self, staging: "Staging", share: Share, lasting: set[int]) -> None:
        self._staging, self._common = staging, pickle.dumps(share.common)
        self._items = [item if _lasts(item, lasting) else _detached(item) for item in share.items]
        self._stream = SideStream(next((item.data.device for item in share.items), torch.device("cpu")))
        self._made = threading.Event()

    def make(self) -> Share:
        """The share, which later changes of the tensors do not reach."""
        try:
            with self._stream.queue():
                items = self._staging.fill(self._items)
        finally:
            self._items = []
            self._made.set()
        return Share(items, pickle.loads(self._common))

    def wait(self) -> None:
        """Until nothing is read from the tensors any more, also when copying them has failed."""
        self._made.wait()


class Staging:
    """Host memory for copies, pinned beside an accelerator; kept for the next one, as new memory is slow."""

    def __init__(self) -> None:
        self._buffers: dict[_Place, torch.Tensor] = {}

    def copy(self, share: Share, parameters: Iterable[torch.Tensor]) -> Copy:
        """Begin to copy a share; the one before must have been written.

        Optimizer state and tensors in the memory of `parameters` have to stay as they are until the copy is made.
        """
        return Copy(self, share, {parameter.untyped_storage().data_ptr() for parameter in parameters})

    def fill(self, items: list[Item]) -> list[Item]:
        """Items with the same contents in memory of this staging."""
        before, self._buffers = self._buffers, {}
        return [self._filled(item, before.get((item.key, item.offset))) for item in items]

    def _filled(self, item: Item, buffer: torch.Tensor | None) -> Item:
        data = item.data
        if buffer is None or buffer.shape != data.shape or buffer.dtype != data.dtype:
            buffer = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.device.type != "cpu")
        buffer.copy_(data, non_blocking=True)
        self._buffers[item.key, item.offset] = buffer
        return Item(item.key, item.offset, item.shape, buffer)


def _lasts(item: Item, lasting: set[int]) -> bool:
    return item.key.startswith("optimizer.") or item.data.untyped_storage().data_ptr() in lasting


def _detached(item: Item) -> Item:
    return Item(item.key, item.offset, item.shape, item.data.clone())
