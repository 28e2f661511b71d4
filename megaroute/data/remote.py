"""Reading files at a URL: http(s), `pipe:` commands, and what fsspec or a registered opener knows.

A thread reads and the caller waits for it with a time limit, so that no opener, however it blocks, can hang a run.
"""

import contextlib
import http.client
import os
import queue
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megaroute.common.errors import DataError
from megaroute.config.data import PIPE, RemoteConfig, is_remote
from megaroute.data.retry import retry

Opener = Callable[[str], BinaryIO]

CHUNK_BYTES = 2**16
QUEUED_CHUNKS = 16
TICK_S = 0.2
GONE = (404, 410)
REFUSED = (401, 403)

_openers: dict[str, Opener] = {}


class Gone(Exception):
    """The server says that there is no such file."""


class Refused(Exception):
    """The server says that we may not read the file."""


def register_opener(scheme: str, opener: Opener) -> None:
    """Have `opener(url)` open files at `scheme`://, as a binary stream whose `read` raises OSError when it is cut."""
    _openers[scheme] = opener


def url_of(folder: str, name: str) -> str:
    """URL of a file of a remote folder: its name put for `{name}` in a pipe, else before the query of the URL."""
    if folder.startswith(PIPE):
        return folder.replace("{name}", name)
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{urllib.parse.quote(name)}{mark}{query}"


def location(folder: str | Path, name: str) -> str:
    """Path or URL of a file of a folder, to be shown."""
    return url_of(str(folder), name) if is_remote(folder) else str(Path(folder) / name)


def fetch(url: str, settings: RemoteConfig, key: str) -> bytes:
    """Content of a small file.  Raises DataError, which begins with `key`, when it cannot be had after all tries."""
    try:
        return retry(lambda: b"".join(chunks(url, settings)), settings, may_pass, url)
    except DataError:
        raise
    except Exception as error:
        raise unreachable(url, error, settings, key) from error


def unreachable(url: str, error: Exception, settings: RemoteConfig, key: str) -> DataError:
    """What a file that could not be had is reported as."""
    if isinstance(error, Refused):
        return DataError(f"{key}: {url} may not be read ({error}); check the credentials")
    return DataError(
        f"{key}: {url} cannot be fetched after {settings.attempts} tries ({describe(error)}), so its text cannot be "
        f"read; check the address, the server and the network, or raise data.remote.attempts"
    )


def describe(error: Exception) -> str:
    """An error's text, or its kind where it has none."""
    return str(error) or type(error).__name__


def may_pass(error: Exception) -> bool:
    """Whether another try may help."""
    return not isinstance(error, (DataError, Refused))


def chunks(url: str, settings: RemoteConfig) -> Iterator[bytes]:
    """The file's bytes, in pieces of up to 64 KiB.

    Raises TimeoutError when there is no answer within `connect_s` or no further piece within `stall_s`, Gone, Refused,
    or whatever the opener raises.
    """
    messages: queue.Queue[Any] = queue.Queue(QUEUED_CHUNKS)
    stop = threading.Event()
    threading.Thread(target=_pump, args=(url, settings, messages, stop), daemon=True).start()
    stream = None
    try:
        stream = _next(messages, settings.connect_s, "no answer")
        while (chunk := _next(messages, settings.stall_s, "stalled: not 64 KiB")) is not None:
            yield chunk
    finally:
        stop.set()
        if isinstance(stream, _Pipe):
            stream.kill()


def _next(messages: "queue.Queue[Any]", limit_s: float, what: str) -> Any:
    try:
        message = messages.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"{what} within {limit_s:g} s") from None
    if isinstance(message, BaseException):
        raise message
    return message


def _pump(url: str, settings: RemoteConfig, messages: "queue.Queue[Any]", stop: threading.Event) -> None:
    """Open the stream, and give it, its chunks, and None; or the error."""

    def give(message: Any) -> None:
        while not stop.is_set():
            try:
                return messages.put(message, timeout=TICK_S)
            except queue.Full:
                continue

    try:
        with _open(url, settings) as stream:
            give(stream)
            while not stop.is_set() and (chunk := stream.read(CHUNK_BYTES)):
                give(chunk)
            missing = getattr(stream, "length", None) if isinstance(stream, http.client.HTTPResponse) else None
            if missing:  # read() takes a cut connection for the end
                raise ConnectionError(f"connection closed with {missing} bytes missing")
        give(None)
    except urllib.error.HTTPError as error:
        kind = Gone if error.code in GONE else Refused if error.code in REFUSED else OSError
        give(kind(f"HTTP {error.code} {error.reason}"))
    except FileNotFoundError as error:
        give(Gone(describe(error)))
    except PermissionError as error:
        give(Refused(describe(error)))
    except BaseException as error:
        give(error)


def _open(url: str, settings: RemoteConfig) -> Any:
    if url.startswith(PIPE):
        return _Pipe(url.removeprefix(PIPE))
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme in _openers:
        return _openers[scheme](url)
    if scheme in ("http", "https"):
        # This only ends an abandoned thread; the caller's own limits come first.
        return urllib.request.urlopen(url, timeout=2 * max(settings.connect_s, settings.stall_s))
    return _open_fsspec(url, scheme)


def _open_fsspec(url: str, scheme: str) -> Any:
    try:
        import fsspec

        return fsspec.open(url, "rb").open()
    except (ImportError, ValueError) as error:  # ValueError: it does not know the scheme
        raise DataError(
            f"{url} cannot be opened ({error}); install fsspec with its package for {scheme}:// "
            f"(for s3: pip install 'megaroute[s3]'), or use pipe: with a command that reads it"
        ) from error


class _Pipe:
    """Standard output of a shell command.  At its end the command must have succeeded."""

    def __init__(self, command: str) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the pipe)
        # A group of its own: the shell's children are killed with it.
        self._process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=self._complaints, start_new_session=True
        )

    def __enter__(self) -> "_Pipe":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._process.communicate()
        self._complaints.close()

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        chunk = self._process.stdout.read(size)
        if not chunk and (status := self._process.wait()):
            self._complaints.seek(0)
            last = self._complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise OSError(f"the command ended with status {status}" + "".join(f": {line}" for line in last))
        return chunk

    def kill(self) -> None:
        """End the command, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
