"""A folder with a Hugging Face model: its configuration, and its weights one tensor at a time."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from megaroute.common.errors import UserError
from megaroute.export.hf.configuration_megaroute import MegarouteConfig
from megaroute.export.safetensors_writer import INDEX, NAMES

DTYPES = {name: dtype for dtype, name in NAMES.items() if dtype is not torch.float64}
ONE_FILE, SETTINGS = "model.safetensors", "config.json"
OURS = "megaroute"


class ModelError(UserError):
    """A folder that holds no model which can be imported."""


class Stored(NamedTuple):
    """Where a tensor is, and what is known of it without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HFFolder:
    """Settings and tensors by name.  Runs no code from the folder, and reads no pickle.

    Raises ModelError when the folder holds no model of a kind in `kinds`, or a file of it is missing or damaged.
    """

    def __init__(self, path: Path, kinds: tuple[str, ...]) -> None:
        self.path = path
        self.raw = self._json(path / SETTINGS)
        kind = self.raw.get("model_type")
        if kind not in kinds:
            raise ModelError(
                f"model_type {kind!r} in {path / SETTINGS} cannot be imported: megaroute's model computes those of "
                f"{', '.join(kinds)}; convert one of these"
            )
        self.kind = str(kind)
        self.settings: dict[str, Any] = self._complete()
        """What config.json says, and the defaults of what it leaves out."""
        self.tensors: dict[str, Stored] = self._list()

    def read(self, name: str) -> Tensor:
        """A whole tensor.  Its file is mapped for this tensor only, so that what was read does not stay in memory."""
        file = self.tensors[name].file
        try:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    def _json(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            raise ModelError(
                f"{self.path} is no folder of a Hugging Face model: {file.name} is not there; give its path"
            )
        try:
            value = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is no JSON ({error}); copy the model again") from error
        if not isinstance(value, dict):
            raise ModelError(f"{file} holds a {type(value).__name__}, not an object; copy the model again")
        return value

    def _complete(self) -> dict[str, Any]:
        try:
            if self.kind == OURS:
                return dict(MegarouteConfig(**self.raw).to_dict())
            return dict(AutoConfig.for_model(**self.raw).to_dict())
        except Exception as error:  # transformers validates with exceptions of many kinds
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{self.path / SETTINGS} is refused by transformers ({reason}); correct it") from error

    def _list(self) -> dict[str, Stored]:
        index, single = self.path / INDEX, self.path / ONE_FILE
        if index.is_file():
            where: Any = self._json(index).get("weight_map")
            if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
                raise ModelError(f"{index} has no weight_map of files by tensor; copy the model again")
            files = {file: self._scan(file) for file in sorted(set(where.values()))}
            for name, file in where.items():
                if name not in files[file]:
                    raise ModelError(
                        f"{self.path / file} lacks {name}, which {INDEX} says is in it; copy the model again"
                    )
            return {name: files[file][name] for name, file in where.items()}
        if single.is_file():
            return self._scan(ONE_FILE)
        raise ModelError(
            f"{self.path} has neither {ONE_FILE} nor {INDEX}; other formats can run code when they are read: load the "
            "model with transformers and save it with save_pretrained"
        )

    def _scan(self, name: str) -> dict[str, Stored]:
        file = self.path / name
        if file.parent != self.path or not file.is_file():
            raise ModelError(f"{file} is not there, though {INDEX} names it; copy the model again")
        found = {}
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(key)
                    if part.get_dtype() not in DTYPES:
                        raise ModelError(
                            f"{key} in {file} has numbers of type {part.get_dtype()}, and {', '.join(DTYPES)} can be "
                            "imported; save the model in one of these"
                        )
                    found[key] = Stored(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        return found


def _damaged(file: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"{file} is cut short or no safetensors file ({reason}); copy the model again")
