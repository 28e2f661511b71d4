"""Documents in files: JSON lines (plain, gz, xz, zst), Parquet, and whole text files."""

import gzip
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megaroute.common.errors import DataError

LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (".txt", ".py")
SUFFIXES = (*LINE_SUFFIXES, PARQUET_SUFFIX, *TEXT_SUFFIXES)
ALL_METADATA = "all"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 2**20
ROWS = 1024  # of a Parquet file in memory at a time


@dataclass(frozen=True)
class Document:
    """One text, a name for it, and what else is known of it."""

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TextFile:
    """A file of documents; `name` stands for it in document ids, so that ids do not depend on the machine."""

    path: Path
    name: str
    skip_undecodable: bool = False


@dataclass(frozen=True)
class Piece:
    """A file, or a range of it: of bytes in plain JSON lines, of row groups in Parquet.

    A line belongs to the piece that holds its first byte.
    """

    file: TextFile
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Fields:
    """Names of JSON fields or Parquet columns: the text, the id if there is one, and the metadata that is kept."""

    text: str = "text"
    id: str = "id"
    metadata: tuple[str, ...] = ()
    """Names, or `("all",)` for every field but text and id."""

    def document(self, record: Any, where: Callable[[], str], default_id: str) -> Document:
        """The document of one record.  Raises DataError, naming `where()`, for one without a text."""
        text = record.get(self.text) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where()} has no string field {self.text!r}; name the right one with --text-field")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where()} has text that is not valid Unicode ({error.reason}); repair or remove the line"
            ) from error
        name = record.get(self.id)
        return Document(default_id if name is None else str(name), text, self._metadata(record))

    def columns(self, available: list[str]) -> list[str]:
        """Those of `available` that are read."""
        wanted = {self.text, self.id, *self.metadata}
        return available if self.metadata == (ALL_METADATA,) else [name for name in available if name in wanted]

    def _metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        names = record if self.metadata == (ALL_METADATA,) else [name for name in self.metadata if name in record]
        return {name: record[name] for name in names if name not in (self.text, self.id)}


def read_piece(piece: Piece, fields: Fields = Fields()) -> Iterator[Document]:
    """Documents of a piece that are not empty.  A document without an id is named by its file and place in it.

    Raises DataError for a file that is unreadable, damaged, cut off, or needs a package that is not installed.
    """
    path = piece.file.path
    try:
        if path.name.endswith(TEXT_SUFFIXES):
            documents = _read_text(piece.file)
        elif path.name.endswith(PARQUET_SUFFIX):
            documents = _read_parquet(piece, fields)
        else:
            documents = _read_lines(piece, fields)
        for document in documents:
            if document.text:
                yield document
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); repair the file or leave it out") from error


def import_extra(module: str, extra: str, why: str) -> Any:
    """An optional package.  Raises DataError with the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{why} needs the package {module.partition('.')[0]}, which is not installed; "
            f"install it with pip install 'megaroute[{extra}]'"
        ) from error


def _read_text(file: TextFile) -> Iterator[Document]:
    try:
        yield Document(file.name, file.path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        if not file.skip_undecodable:
            raise


def _read_lines(piece: Piece, fields: Fields) -> Iterator[Document]:
    path, name = piece.file.path, piece.file.name
    with _open_lines(path) as lines:
        offset = _first_line(lines, piece.start)
        for number, line in enumerate(lines, start=1):
            if piece.end is not None and offset >= piece.end:
                return
            if line.strip():

                def where(number: int = number) -> str:
                    return f"{path}:{number + _lines_before(piece)}"

                yield fields.document(_parse(line, where), where, f"{name}@{offset}")
            offset += len(line)


def _first_line(lines: IO[bytes], start: int) -> int:
    """Go to the first line that begins at `start` or later; its offset."""
    if not start:
        return 0
    lines.seek(start - 1)
    return start - 1 + len(lines.readline())


def _lines_before(piece: Piece) -> int:
    """Lines that begin before the piece; counted when an error names one, for it takes a pass over the file."""
    with open(piece.file.path, "rb") as file:
        start = _first_line(file, piece.start)
        file.seek(0)
        sizes = [min(READ_BYTES, start - at) for at in range(0, start, READ_BYTES)]
        return sum(file.read(size).count(b"\n") for size in sizes)


def _parse(line: bytes, where: Callable[[], str]) -> Any:
    try:
        return json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where()} is not UTF-8 ({error}); repair the line or leave the file out") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where()} is not JSON ({error}); repair the line or leave the file out") from error


def _open_lines(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # it has what IO[bytes] has
    if path.name.endswith(".xz"):
        return lzma.open(path, "rb")
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), READ_BYTES)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Frames of a zst file, one after another.  The package's own reader takes a cut off file for a whole one."""

    def __init__(self, path: Path) -> None:
        self._zstd = import_extra("zstandard", "zstd", f"reading {path}")
        self._file = path.open("rb")
        self._packed = self._unpacked = b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._fill():
            pass
        part, self._unpacked = self._unpacked[: len(buffer)], self._unpacked[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _fill(self) -> bool:
        """Unpack a little more; False at the end."""
        self._packed = self._packed or self._file.read(2**16)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the file ends inside a frame")
            return False
        self._frame = self._frame or self._zstd.ZstdDecompressor(max_window_size=2**31).decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except self._zstd.ZstdError as error:
            raise OSError(str(error)) from error
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True


def row_group_bytes(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file.  Raises DataError when it cannot be read."""
    with _open_parquet(path) as file:
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


def _read_parquet(piece: Piece, fields: Fields) -> Iterator[Document]:
    path, name = piece.file.path, piece.file.name
    with _open_parquet(path) as file:
        columns = fields.columns(file.schema_arrow.names)
        if fields.text not in columns:
            raise DataError(
                f"{path} has no column {fields.text!r}, it has {', '.join(file.schema_arrow.names)}; name the right "
                f"one with --text-field"
            )
        end = file.num_row_groups if piece.end is None else piece.end
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        for batch in file.iter_batches(batch_size=ROWS, row_groups=list(range(piece.start, end)), columns=columns):
            for record in batch.to_pylist():
                yield fields.document(record, lambda row=row: f"{path}, row {row}", f"{name}@{row}")  # type: ignore[misc]
                row += 1


def _open_parquet(path: Path) -> Any:
    pyarrow = import_extra("pyarrow", "parquet", f"reading {path}")
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read ({error}); repair the file or leave it out") from error
