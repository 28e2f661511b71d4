"""Command-line flags that name a text corpus; the tools that read one share them."""

import argparse
from collections.abc import Iterator

from tqdm import tqdm

from megaroute.data.documents import Document, TextFile, input_files, read_documents, stdlib_files
from megaroute.data.formats import SUFFIXES


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --input or --source, --text-field, --id-field and --max-bytes."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="GLOB", help=f"files or quoted patterns: {', '.join(SUFFIXES)}")
    source.add_argument(
        "--source", choices=["stdlib"], help="stdlib: the Python files of the running Python's standard library"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSON field of the text (%(default)s)")
    parser.add_argument("--id-field", default="id", metavar="NAME", help="JSON field of the id, if any (%(default)s)")
    parser.add_argument(
        "--max-bytes",
        type=parse_size,
        metavar="N",
        help="stop after about N bytes of text (suffix k, M or G), taken from all files",
    )


def corpus_files(arguments: argparse.Namespace) -> list[TextFile]:
    """Files that the flags name.  Raises DataError when there are none, or ones of an unknown kind."""
    return stdlib_files() if arguments.source else input_files(arguments.input)


def corpus_documents(arguments: argparse.Namespace) -> Iterator[Document]:
    """Documents that the flags name, with a progress bar on a terminal.  Raises DataError for files it cannot read."""
    documents = read_documents(
        corpus_files(arguments),
        text_field=arguments.text_field,
        id_field=arguments.id_field,
        max_bytes=arguments.max_bytes,
    )
    return _with_progress(documents, arguments.max_bytes)


def _with_progress(documents: Iterator[Document], total: int | None) -> Iterator[Document]:
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="reading") as bar:
        for document in documents:
            yield document
            bar.update(len(document.text.encode()))


def parse_size(text: str) -> int:
    """Positive number of bytes from "1500", "64k", "16M" or "2G"; suffixes are powers of 1024."""
    units = {"k": 2**10, "M": 2**20, "G": 2**30}
    number = text[:-1] if text[-1:] in units else text
    if not (number.isascii() and number.isdigit() and int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of bytes such as 1500, 64k, 16M or 2G")
    return int(number) * units.get(text[-1], 1)
