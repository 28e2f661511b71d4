"""How a corpus is cut into parts that are written apart.

The cut depends on the files and on the size of a part alone, never on how many processes there are; that is why any
number of them writes the same shards.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from megaroute.data.formats import PARQUET_SUFFIX, Piece, TextFile, row_group_bytes

Part: TypeAlias = tuple[Piece, ...]


def plan_parts(files: Sequence[TextFile], part_bytes: int) -> list[Part]:
    """Cut files into parts of at most `part_bytes` bytes on disk, in the order of the files.

    Small files share a part.  Plain JSON lines are cut by bytes and Parquet by row groups; a compressed or a text file
    stays whole, and may make a larger part.  Raises DataError for a Parquet file that cannot be read.
    """
    parts: list[list[Piece]] = []
    room = 0
    for file in files:
        for piece, size in _pieces(file, part_bytes):
            if size > room or not parts:
                parts.append([])
                room = part_bytes
            parts[-1].append(piece)
            room -= size
    return [tuple(part) for part in parts]


def _pieces(file: TextFile, part_bytes: int) -> Iterator[tuple[Piece, int]]:
    size = file.path.stat().st_size
    if size > part_bytes and file.path.name.endswith(".jsonl"):
        for start in range(0, size, part_bytes):
            end = min(start + part_bytes, size)
            yield Piece(file, start, end), end - start
    elif size > part_bytes and file.path.name.endswith(PARQUET_SUFFIX):
        sizes = row_group_bytes(file.path)
        yield from ((Piece(file, group, group + 1), size) for group, size in enumerate(sizes))
    else:
        yield Piece(file), size
