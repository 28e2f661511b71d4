"""Documents of a corpus: files by pattern, or the running Python's own library; all of them, or a part of each."""

import glob
import hashlib
import os
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megaroute.common.errors import DataError
from megaroute.data.formats import SUFFIXES, Document, Fields, Piece, TextFile, read_piece

__all__ = ["Document", "TextFile", "input_files", "name_hash", "read_documents", "stdlib_files"]

WINDOW = 16  # files read side by side when only a part of the corpus is wanted
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def name_hash(name: str, purpose: str) -> int:
    """A number below 2^64 that depends on its arguments alone; different purposes draw independently."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest())


def input_files(patterns: Sequence[str]) -> list[TextFile]:
    """Files that match the glob patterns, sorted within each.  Raises DataError for no match or an unknown suffix.

    A file's name is its path below the last folder of the pattern that has no wildcard, or its whole path where two
    files would have the same name.
    """
    files: dict[Path, TextFile] = {}
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"--input: no file matches {pattern!r}, so there is nothing to read; check the path")
        root = _folder_of(pattern)
        for path in map(Path, found):
            files.setdefault(path, TextFile(path, path.relative_to(root).as_posix()))
    for path in files:
        if not path.is_file() or not path.name.endswith(SUFFIXES):
            raise DataError(f"--input: {path} is not a {', '.join(SUFFIXES)} file; leave it out")
    names = Counter(file.name for file in files.values())
    return [file if names[file.name] == 1 else replace(file, name=file.path.as_posix()) for file in files.values()]


def _folder_of(pattern: str) -> Path:
    parts = Path(pattern).parts[:-1]
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:plain])


def stdlib_files() -> list[TextFile]:
    """The .py files of the running Python's standard library without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return [TextFile(path, path.relative_to(root).as_posix(), skip_undecodable=True) for path in sorted(paths)]


def read_documents(
    files: Sequence[TextFile],
    *,
    text_field: str = "text",
    id_field: str = "id",
    metadata: Sequence[str] = (),
    max_bytes: int | None = None,
) -> Iterator[Document]:
    """Documents that are not empty, file after file, with the fields named in `metadata` ("all": every one).

    With `max_bytes` (UTF-8 bytes of text) they come in turns from files in an order drawn by their names, so that a
    part of the corpus has something of everything; the document that reaches the bound is the last.
    """
    return read_pieces(list(map(Piece, files)), Fields(text_field, id_field, tuple(metadata)), max_bytes)


def read_pieces(pieces: Sequence[Piece], fields: Fields, max_bytes: int | None = None) -> Iterator[Document]:
    """Documents of the pieces; as `read_documents`."""
    if max_bytes is None:
        yield from (document for piece in pieces for document in read_piece(piece, fields))
        return
    drawn = sorted(pieces, key=lambda piece: name_hash(piece.file.name, "order"))
    for document in _take_turns([read_piece(piece, fields) for piece in drawn]):
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
