"""The tensors of a checkpoint, read one at a time, without a model and in one process."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megaroute.checkpoint.integrity import damaged
from megaroute.checkpoint.unpickle import METADATA, read_metadata


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors:
    """Tensors of a complete checkpoint by key.  Raises CheckpointError for what cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path, self._metadata = path, read_metadata(path)

    def __iter__(self) -> Iterator[TensorInfo]:
        """All of them, in the order of their keys."""
        for key, found in sorted(self._metadata.state_dict_metadata.items()):
            yield TensorInfo(key, tuple(found.size), found.properties.dtype)  # type: ignore[union-attr]

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor, put together from what the ranks wrote."""
        found: Any = self._metadata.state_dict_metadata[key]
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        filled = 0
        for chunk in found.chunks:
            part = self._part(MetadataIndex(key, chunk.offsets))
            place = whole
            for axis, (begin, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(axis, begin, length)
            if part.shape != place.shape or part.dtype != whole.dtype:
                raise damaged(self.path / METADATA, f"a part of {key} is {part.dtype} {tuple(part.shape)}")
            place.copy_(part)
            filled += part.numel()
        if filled != whole.numel():
            raise damaged(self.path / METADATA, f"{key} has {whole.numel()} numbers, of which {filled} are there")
        return whole

    def _part(self, index: MetadataIndex) -> torch.Tensor:
        place = self._metadata.storage_data[index]
        file = self.path / place.relative_path
        try:
            with open(file, "rb") as opened:
                opened.seek(place.offset)
                content = io.BytesIO(opened.read(place.length))
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no tensor can raise anything
            raise damaged(file, f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error


class Difference(NamedTuple):
    """How a tensor of one checkpoint differs from that of another."""

    key: str
    what: str
    """Empty when they have the same bits."""
    largest: float = 0.0
    """Largest absolute difference of two numbers."""


def compare(one: Tensors, other: Tensors) -> Iterator[Difference]:
    """Every tensor of either checkpoint; two are in memory at a time."""
    mine, theirs = ({info.key: info for info in tensors} for tensors in (one, other))
    for key in sorted({*mine, *theirs}):
        if key not in mine or key not in theirs:
            yield Difference(key, f"only in {(one if key in mine else other).path}", math.inf)
        elif mine[key].shape != theirs[key].shape:
            yield Difference(key, f"shape {mine[key].shape} and {theirs[key].shape}", math.inf)
        else:
            yield _difference(key, one.read(key), other.read(key))


def _difference(key: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
        return Difference(key, "")
    different = "" if a.dtype == b.dtype else f"{a.dtype} and {b.dtype}; "
    gap = a.double().sub_(b.double()).abs_()
    count = int((gap != 0).sum())  # NaN differs from everything
    largest = float(gap.nan_to_num(nan=math.inf).max())
    return Difference(key, f"{different}{count:,} of {a.numel():,} numbers differ", largest)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
