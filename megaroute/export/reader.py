"""Weights of a checkpoint, read one tensor at a time, whatever layout wrote them."""

from pathlib import Path

import torch
from torch import Tensor

from megaroute.checkpoint.tensors import TensorInfo, Tensors
from megaroute.common.errors import CheckpointError


class CheckpointReader:
    """Tensors by name.  Optimizer state is beside them and is never read.

    Raises CheckpointError when the checkpoint cannot be read or lacks a tensor.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._tensors = Tensors(checkpoint)
        self._known = {info.key: info for info in self._tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Precision in which it is stored."""
        return self._info(name).dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from the parts of all ranks."""
        return self._tensors.read(self._info(name).key)

    def _info(self, name: str) -> TensorInfo:
        if name not in self._known:
            raise CheckpointError(f"{self.checkpoint} has no tensor {name}; the checkpoint belongs to another model")
        return self._known[name]
