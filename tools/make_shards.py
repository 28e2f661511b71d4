"""Make folders of tar shards with a manifest from text files or from the Python standard library."""

import argparse
import sys
from pathlib import Path

from megaroute.common.errors import UserError
from megaroute.data.build import build_shards
from megaroute.data.corpus_arguments import add_corpus_arguments, corpus_documents, parse_size
from megaroute.data.manifest import Manifest
from megaroute.data.tokenizer import Tokenizer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked against each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_corpus_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="record its checksum and count tokens with it")
    parser.add_argument(
        "--shard-bytes", type=parse_size, default="64M", metavar="N", help="text of a shard (%(default)s)"
    )
    parser.add_argument("--valid-out", type=Path, metavar="DIR", help="put a share of the documents here instead")
    parser.add_argument("--valid-fraction", type=float, metavar="F", help="that share, drawn by document id (0.05)")
    parser.add_argument("--overwrite", action="store_true", help="replace folders of shards that exist")
    arguments = parser.parse_args(argv)
    if arguments.valid_fraction is None:
        arguments.valid_fraction = 0.05
    elif arguments.valid_out is None:
        parser.error("--valid-fraction needs --valid-out")
    if not 0 < arguments.valid_fraction < 1:
        parser.error(f"--valid-fraction must lie between 0 and 1, got {arguments.valid_fraction}")
    return arguments


def describe(folder: Path, manifest: Manifest) -> str:
    """One line on what a folder holds."""
    tokens = "" if manifest.tokens is None else f", {manifest.tokens:,} tokens"
    return (
        f"{folder}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.text_bytes:,} bytes of text{tokens}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    arguments = parse_arguments(argv)
    try:
        manifests = build_shards(
            corpus_documents(arguments),
            arguments.out,
            shard_bytes=arguments.shard_bytes,
            tokenizer=Tokenizer(arguments.tokenizer, "--tokenizer") if arguments.tokenizer else None,
            valid_out=arguments.valid_out,
            valid_fraction=arguments.valid_fraction,
            overwrite=arguments.overwrite,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for folder, manifest in zip((arguments.out, arguments.valid_out), manifests, strict=False):
        print(describe(folder, manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
