"""Small files written whole or not at all, and checksums."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part (write, fsync, rename)."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """`atomic_write` of `value` as JSON with a closing newline; `indent` None puts it on one line."""
    atomic_write(path, json.dumps(value, indent=indent) + "\n")


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hexadecimal sha256 of a string's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
