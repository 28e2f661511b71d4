"""Documents from text files: JSON lines (plain, gz, xz), whole text files, and the running Python's own library."""

import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megaroute.common.errors import DataError

OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
TEXT_SUFFIXES = (".txt", ".py")
WINDOW = 16  # files read side by side when only a part of the corpus is wanted
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text and a name for it."""

    id: str
    text: str


@dataclass(frozen=True)
class TextFile:
    """A file of documents; `name` stands for it in document ids, so that ids do not depend on the machine."""

    path: Path
    name: str
    skip_undecodable: bool = False


def name_hash(name: str, purpose: str) -> int:
    """A number below 2^64 that depends on its arguments alone; different purposes draw independently."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest())


def input_files(patterns: Sequence[str]) -> list[TextFile]:
    """Files that match the glob patterns, sorted within each.  Raises DataError for no match or an unknown suffix."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input: no file matches {pattern!r}, so there is nothing to read; check the path")
        paths |= dict.fromkeys(map(Path, found))
    for path in paths:
        if not path.is_file() or not path.name.endswith((*OPENERS, *TEXT_SUFFIXES)):
            raise DataError(f"--input: {path} is not a {', '.join((*OPENERS, *TEXT_SUFFIXES))} file; leave it out")
    return [TextFile(path, path.name) for path in paths]


def stdlib_files() -> list[TextFile]:
    """The .py files of the running Python's standard library without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return [TextFile(path, path.relative_to(root).as_posix(), skip_undecodable=True) for path in sorted(paths)]


def read_documents(
    files: Sequence[TextFile], *, text_field: str = "text", id_field: str = "id", max_bytes: int | None = None
) -> Iterator[Document]:
    """Documents that are not empty, file after file.

    With `max_bytes` (UTF-8 bytes of text) they come in turns from files in an order drawn by their names, so that a
    part of the corpus has something of everything; the document that reaches the bound is the last.
    """
    readers = [(file, _read_file(file, text_field, id_field)) for file in files]
    if max_bytes is None:
        yield from (document for _, reader in readers for document in reader)
        return
    readers.sort(key=lambda pair: name_hash(pair[0].name, "order"))
    for document in _take_turns([reader for _, reader in readers]):
        yield document
        max_bytes -= len(document.text.encode())
        if max_bytes <= 0:
            return


def _take_turns(readers: Iterable[Iterator[Document]]) -> Iterator[Document]:
    waiting = deque(readers)
    active = deque(waiting.popleft() for _ in range(min(WINDOW, len(waiting))))
    while active:
        reader = active.popleft()
        document = next(reader, None)
        if document is not None:
            yield document
            active.append(reader)
        elif waiting:
            active.append(waiting.popleft())


def _read_file(file: TextFile, text_field: str, id_field: str) -> Iterator[Document]:
    try:
        if file.path.name.endswith(TEXT_SUFFIXES):
            yield from _read_text(file)
        else:
            yield from _read_json_lines(file, text_field, id_field)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file.path} cannot be read ({error}); repair the file or leave it out") from error


def _read_text(file: TextFile) -> Iterator[Document]:
    try:
        text = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        if file.skip_undecodable:
            return
        raise
    if text:
        yield Document(file.name, text)


def _read_json_lines(file: TextFile, text_field: str, id_field: str) -> Iterator[Document]:
    with _open_lines(file.path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                document = _parse_line(line, f"{file.path}:{number}", f"{file.name}:{number}", text_field, id_field)
                if document.text:
                    yield document


def _open_lines(path: Path) -> IO[str]:
    opener = next(opener for suffix, opener in OPENERS.items() if path.name.endswith(suffix))
    return io.TextIOWrapper(opener(path, "rb"), encoding="utf-8-sig", newline="\n")


def _parse_line(line: str, where: str, default_id: str, text_field: str, id_field: str) -> Document:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); repair the line or leave the file out") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where} has no string field {text_field!r}; name the right one with --text-field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has text that is not valid Unicode ({error.reason}); repair or remove the line"
        ) from error
    name = record.get(id_field)
    return Document(default_id if name is None else str(name), text)
