"""Writing a rank's share of a checkpoint: one file of tensors, in torch's distributed format.

Planning, staging (`staging.py`) and writing are apart, so that writing can go on in a thread while training goes on.  A
thread and not a process: it needs no fork beside the threads of gloo or a CUDA context, dies with its rank, and shares
its memory.  Nothing here talks to other ranks.
"""

import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megaroute.checkpoint.integrity import FileRecord, HashedFile, describe
from megaroute.checkpoint.pieces import leaves
from megaroute.checkpoint.unpickle import COMMON, METADATA


@dataclass(frozen=True)
class Item:
    """A tensor to write, or a rectangle of one."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""
    data: torch.Tensor


@dataclass
class Share:
    """What one rank writes."""

    items: list[Item]
    common: dict[str, Any]
    """What is no sharded tensor, equal on all ranks."""

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(item.data.nbytes for item in self.items)


@dataclass
class Written:
    """What one rank wrote."""

    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, str, int, int]]
    """Key, offset, size, shape of the whole, dtype, file, first byte, bytes."""
    files: dict[str, FileRecord] = field(default_factory=dict)


def plan(state: dict[str, Any]) -> Share:
    """What of a sharded state dict this rank writes: of what several ranks hold, one does."""
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    items = [
        Item(value.key, tuple(value.global_offset), tuple(value.global_shape), _shaped(value))
        for value in leaves(sharded)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id)
    ]
    return Share(items, common)


def _shaped(value: ShardedTensor) -> torch.Tensor:
    """Its data with as many axes as the whole tensor has."""
    assert value.data is not None
    return value.data.detach().view((1,) * value.prepend_axis_num + tuple(value.local_shape))


def write(share: Share, folder: Path, rank: int) -> Written:
    """Write a share into `folder`, which exists; rank 0 also writes what is no sharded tensor.  Raises OSError."""
    written = write_items(share.items, folder, rank) if share.items else Written([])
    if rank == 0:
        written.files |= write_common(share.common, folder)
    return written


def write_common(common: dict[str, Any], folder: Path) -> dict[str, FileRecord]:
    """Write what is no sharded tensor."""
    with open(folder / COMMON, "wb") as raw:
        file: Any = HashedFile(raw)
        torch.save(common, file)
        _to_disk(raw)
    return {COMMON: file.record()}


def write_items(items: Iterable[Item], folder: Path, rank: int) -> Written:
    """Write tensors into the file of a rank, one after the other, so that no more than one need be in memory."""
    written, name = Written([]), f"__{rank}_0.distcp"
    with open(folder / name, "wb") as raw:
        file: Any = HashedFile(raw)
        for item in items:
            begin = file.tell()
            torch.save(_alone(item.data), file)
            place = (name, begin, file.tell() - begin)
            size = tuple(item.data.shape)
            written.chunks.append((item.key, item.offset, size, item.shape, item.data.dtype, *place))
        _to_disk(raw)
    written.files[name] = file.record()
    return written


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, with a storage of its own: torch.save writes whole storages."""
    tensor = tensor.cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def describe_tensors(folder: Path, shares: Sequence[Written]) -> dict[str, FileRecord]:
    """Write the description of what all ranks wrote, for torch and Megatron-core; returns all files.  On rank 0."""
    files = {name: record for share in shares for name, record in share.files.items()}
    with open(folder / METADATA, "wb") as raw:
        pickle.dump(_metadata(chunk for share in shares for chunk in share.chunks), raw)
        _to_disk(raw)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return files | {METADATA: describe(folder / METADATA)}


def _metadata(chunks: Iterable[tuple[Any, ...]]) -> Metadata:
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, offset, size, shape, dtype, name, begin, length in chunks:
        found = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), []))
        found.chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
        places[MetadataIndex(key, offset)] = _StorageInfo(name, begin, length)
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
