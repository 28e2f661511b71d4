"""A folder that appears whole, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaroute.common.errors import UserError

SLACK = 2**26
"""Bytes beside the weights: tokenizer, code, file system."""


class OutputError(UserError):
    """A place that cannot be written to."""


def check_destination(out: Path, needed: int) -> None:
    """Raise OutputError unless `out` is free and its disk has `needed` bytes for weights."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; choose another place, nothing is overwritten")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputError(
            f"{parent} does not exist, so {out.name} cannot be made in it; make it or choose another place"
        )
    free = shutil.disk_usage(parent).free
    if free < needed + SLACK:
        raise OutputError(
            f"{out} needs {(needed + SLACK) / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB free; free some "
            "or choose another disk"
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes it when the block ends well, and goes when it does not."""
    parent = out.absolute().parent
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error}); nothing was left there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
