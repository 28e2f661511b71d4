"""One logger for the package; on a rank other than 0 only warnings and errors are shown, with the rank in front."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = "megaroute"

LONG_S = 3.0
"""Seconds of silence after which a person wonders."""


def get_logger(name: str = ROOT) -> logging.Logger:
    """The package's logger, or a child of it for a module's `__name__`."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


def configure(rank: int = 0, file: str | os.PathLike[str] | None = None) -> None:
    """Log to standard error, and on rank 0 also to `file` when given.  May be called again; the last call holds."""
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


@contextmanager
def when_it_takes_long(message: str, *values: object) -> Iterator[None]:
    """Say what the block does once it has taken LONG_S; what is done or refused at once needs no such line."""
    timer = threading.Timer(LONG_S, get_logger().info, (message, *values))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
