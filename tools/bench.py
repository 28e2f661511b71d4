"""What skipping costs and saves, measured on this machine: `python tools/bench.py layer`.

Each subcommand is a module of tools/benchmarks and prints one row per measurement: a table for people, or with --json
one object per line.
"""

import argparse
import json
import re
import sys
import warnings
from types import ModuleType

if not sys.warnoptions:  # Megatron-core tells its own developers, while imported, what it does without
    warnings.simplefilter("ignore")

from benchmarks import checkpoint, checksum, decode, exchange, layer, quality, step, stream, supply
from benchmarks.common import as_table

from megaroute.common.errors import UserError
from megaroute.common.pipes import quietly

BENCHMARKS: dict[str, ModuleType] = {
    "layer": layer,
    "step": step,
    "exchange": exchange,
    "quality": quality,
    "stream": stream,
    "supply": supply,
    "checksum": checksum,
    "checkpoint": checkpoint,
    "decode": decode,
}


OPTIONS = {
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_kv_heads": "kv_heads",
    "ffn_hidden_size": "ffn",
    "num_layers": "layers",
    "sequence_length": "sequence",
    "global_batch": "rows",
    "micro_batch": "micro_batch",
}
"""Options that stand for keys of the configuration, by the last part of the key."""


def with_options(message: str, arguments: argparse.Namespace) -> str:
    """The message with options of the command line in place of the keys they stand for."""
    for key, name in OPTIONS.items():
        if hasattr(arguments, name):
            message = re.sub(rf"\b(?:\w+\.)*{key}\b", f"--{name.replace('_', '-')}", message)
    return message


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        text = module.__doc__ or ""
        subcommand = subcommands.add_parser(name, help=text.split("\n")[0], description=text)
        module.add_arguments(subcommand)
        subcommand.add_argument("--json", action="store_true", help="one JSON object per row instead of a table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status says whether it measured, never how fast."""
    return quietly(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    arguments = parse_arguments(argv)
    try:
        rows = BENCHMARKS[arguments.benchmark].main(arguments)
    except UserError as error:
        print(f"error: {with_options(str(error), arguments)}", file=sys.stderr)
        return error.exit_code
    print("\n".join(map(json.dumps, rows)) if arguments.json else as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
