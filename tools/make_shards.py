"""Make folders of tar shards with a manifest from text files or from the Python standard library.

Several processes give the same shards as one: `--workers 8`, `mpirun -n 8 python tools/make_shards.py ..`, or
`srun --mpi=pmi2 python tools/make_shards.py ..`.  After a kill the same command goes on with what is missing.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from megaroute.common.errors import MegarouteError
from megaroute.common.log import configure
from megaroute.data.corpus_arguments import add_corpus_arguments, corpus_files, parse_size
from megaroute.data.formats import Fields
from megaroute.data.manifest import Manifest
from megaroute.data.prepare import Request, prepare_shards
from megaroute.data.ranks import Ranks, join_ranks, started_as_first

INTERRUPTED = 130  # what shells report for Ctrl-C


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line, checked against each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument(
        "--metadata",
        nargs="+",
        default=[],
        metavar="NAME",
        help="JSON fields kept beside each text; all: every one (none)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="record its checksum and count tokens with it")
    parser.add_argument(
        "--tokenize", choices=["beside", "only"], help="store the tokenizer's ids beside the texts or instead of them"
    )
    parser.add_argument(
        "--shard-bytes",
        type=parse_size,
        default="64M",
        metavar="N",
        help="text of a shard, and input files of a part, which one process writes (%(default)s)",
    )
    parser.add_argument("--valid-out", type=Path, metavar="DIR", help="put a share of the documents here instead")
    parser.add_argument("--valid-fraction", type=float, metavar="F", help="that share, drawn by document id (0.05)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes of each rank (the machine's cores; 1 under MPI)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders of shards that exist")
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.valid_fraction is None:
        arguments.valid_fraction = 0.05
    elif arguments.valid_out is None:
        parser.error("--valid-fraction needs --valid-out")
    if not 0 < arguments.valid_fraction < 1:
        parser.error(f"--valid-fraction must lie between 0 and 1, got {arguments.valid_fraction}")
    if arguments.tokenize and arguments.tokenizer is None:
        parser.error("--tokenize needs --tokenizer")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers must be 1 or more, got {arguments.workers}")


def request_of(arguments: argparse.Namespace) -> Request:
    """What the arguments ask for."""
    return Request(
        out=arguments.out,
        valid_out=arguments.valid_out,
        valid_fraction=arguments.valid_fraction,
        shard_bytes=arguments.shard_bytes,
        fields=Fields(arguments.text_field, arguments.id_field, tuple(arguments.metadata)),
        tokenizer=arguments.tokenizer,
        tokenize=arguments.tokenize or "no",
        max_bytes=arguments.max_bytes,
        overwrite=arguments.overwrite,
    )


def describe(folder: Path, manifest: Manifest) -> str:
    """One line on what a folder holds."""
    tokens = "" if manifest.tokens is None else f", {manifest.tokens:,} tokens"
    return (
        f"{folder}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.text_bytes:,} bytes of text{tokens}"
    )


def run(arguments: argparse.Namespace, ranks: Ranks) -> list[Manifest]:
    """Make the shards together with the other ranks, if there are any."""
    workers = arguments.workers or (len(os.sched_getaffinity(0)) if ranks.size == 1 else 1)
    note = partial(print, "note:", file=sys.stderr)
    try:
        return prepare_shards(request_of(arguments), partial(corpus_files, arguments), ranks, workers, note)
    except MegarouteError:
        raise  # every rank has it
    except BaseException:
        ranks.abort()
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    arguments = parse_arguments(argv)
    first = started_as_first()
    try:
        ranks = join_ranks()
        first = ranks.rank == 0
        configure(ranks.rank)
        manifests = run(arguments, ranks)
    except MegarouteError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    if first:
        for folder, manifest in zip((arguments.out, arguments.valid_out), manifests, strict=False):
            print(describe(folder, manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
