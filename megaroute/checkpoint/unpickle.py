"""Reading what a checkpoint pickled, without running code from it.

torch's distributed checkpoints describe their tensors in `.metadata`, a pickle, and torch unpickles it as it is:
whoever can write the file can run code in every rank.  Here it may name the classes of such a description and nothing
else.  One of torch's is left out on purpose: an entry marked as bytes would make torch unpickle a part of a `.distcp`
file freely.
"""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megaroute.checkpoint.integrity import damaged
from megaroute.common.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"

_DTYPES = {name for name in vars(torch) if isinstance(getattr(torch, name), torch.dtype)}
_ALLOWED = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
_FORBIDDEN = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")
"""How torch says which name it refused."""


class _Forbidden(Exception):
    """A name that is not allowed."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise _Forbidden(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The description of the tensors of the checkpoint `path`.

    Raises CheckpointError when the file cannot be read, or names what a description of tensors has no use for.
    """
    file = path / METADATA
    try:
        value = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except _Forbidden as error:
        raise _refused(file, str(error)) from None
    except Exception as error:  # bytes that are no pickle can raise anything
        raise damaged(file, _one_line(error)) from error
    if not isinstance(value, Metadata):
        raise damaged(file, f"it holds a {type(value).__name__}, not a description of tensors")
    return value


def read_common(path: Path) -> Any:
    """What of a checkpoint `path` is no sharded tensor.  Raises CheckpointError, as `read_metadata`."""
    file = path / COMMON
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = _FORBIDDEN.search(str(error))
        if forbidden is not None:
            raise _refused(file, forbidden.group(1)) from None
        raise damaged(file, _one_line(error)) from error
    except Exception as error:  # as above
        raise damaged(file, _one_line(error)) from error


def _refused(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file} refers to {name}, which no checkpoint of megaroute does and which could run any code, so it is not "
        "loaded; do not use this checkpoint, and find out who wrote it"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
