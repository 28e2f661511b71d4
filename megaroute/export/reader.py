"""Weights of a checkpoint, read one tensor at a time, whatever layout wrote them."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megaroute.checkpoint.unpickle import read_metadata
from megaroute.common.errors import CheckpointError


class CheckpointReader:
    """Tensors by name.  Optimizer state is beside them and is never read.

    Raises CheckpointError when the folder's index cannot be read, or would run code.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._files = FileSystemReader(checkpoint)
        self._index = read_metadata(checkpoint).state_dict_metadata

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Precision in which it is stored."""
        return self._entry(name).properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, put together from the parts of all ranks."""
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            load({name: tensor}, storage_reader=self._files, no_dist=True)
        except (Exception, CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise CheckpointError(
                f"{self.checkpoint}: {name} cannot be read ({reason}); the checkpoint is damaged"
            ) from error
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._index.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.checkpoint} has no tensor {name}; the checkpoint belongs to another model")
        return entry
