"""Safetensors files written tensor by tensor.

The library's own `save_file` wants all tensors of a file at once.  The format is a length, a JSON header with every
tensor's place, and the tensors' bytes: with shapes known in front, no more than one tensor has to be in memory.
"""

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
INDEX = "model.safetensors.index.json"


class Entry(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_shards(folder: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], shard_bytes: int) -> None:
    """Write files of at most `shard_bytes` (or one tensor) each, and their index when there are several.

    `tensors` gives the data of `entries`, in their order.
    """
    shards = _shards(entries, shard_bytes)
    data = iter(tensors)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / file, shard, data)
        where |= {entry.name: file for entry in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if entry.bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.bytes
    return shards


def _write(path: Path, shard: Sequence[Entry], data: Iterable[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in shard:
        offsets = [at, at + entry.bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry, tensor in zip(shard, data, strict=False):
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
