"""Results of `megaroute evaluate --suite` side by side, as Markdown, with a paired bootstrap of their differences."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megaroute.common.errors import DataError, UserError
from megaroute.evaluation.suite_table import comparison


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files; differences are to the first")
    parser.add_argument("--names", nargs="+", help="what the table calls them (default: names of the files)")
    arguments = parser.parse_args(argv)
    if len(arguments.results) < 2:
        parser.error("one result has nothing to be compared with; name at least two files")
    if arguments.names is not None and len(arguments.names) != len(arguments.results):
        parser.error(f"--names has {len(arguments.names)} names for {len(arguments.results)} files")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    arguments = parse_arguments(argv)
    try:
        results = [read(path) for path in arguments.results]
        print(comparison(results, arguments.names or [path.stem for path in arguments.results]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read(path: Path) -> dict[str, Any]:
    """A result of the suite.  Raises DataError when the file does not hold one."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a file that megaroute evaluate --out wrote") from error
    if not isinstance(result, dict) or "suite" not in result:
        raise DataError(f"{path} holds no result of a suite; name a file that megaroute evaluate --suite --out wrote")
    return result


if __name__ == "__main__":
    sys.exit(main())
