"""Trying again: exponential backoff with jitter, so that a thousand ranks do not come back at the same moment."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from megaroute.common.log import get_logger
from megaroute.config.data import RemoteConfig

T = TypeVar("T")

# A network file system's passing troubles.  A disk that is broken gives EIO for ever, and then the tries run out.
TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.ECONNRESET,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
}

_random = random.SystemRandom()  # a forked worker must not repeat its sibling's draws


def retry(call: Callable[[], T], settings: RemoteConfig, passing: Callable[[Exception], bool], what: str) -> T:
    """The result of `call()`, tried up to `data.remote.attempts` times.  Raises its last error, or one that does not
    pass at once; `what` names the thing in the log."""
    for attempt in range(1, settings.attempts + 1):
        try:
            return call()
        except Exception as error:
            if attempt == settings.attempts or not passing(error):
                raise
            pause = pause_s(attempt, settings)
            get_logger(__name__).warning(
                "%s: try %d of %d failed (%s), next in %.1f s", what, attempt, settings.attempts, error, pause
            )
            time.sleep(pause)
    raise AssertionError("attempts is 1 or more")


def pause_s(attempt: int, settings: RemoteConfig) -> float:
    """Seconds before the try after number `attempt`: doubled each time, bounded, less up to a half by chance."""
    longest = min(settings.max_backoff_s, settings.backoff_s * 2 ** min(attempt - 1, 60))
    return longest * _random.uniform(0.5, 1)


def is_transient(error: Exception) -> bool:
    """Whether reading a local file may work a moment later."""
    return isinstance(error, OSError) and error.errno in TRANSIENT
