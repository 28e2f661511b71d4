"""A local http server that misbehaves on demand."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

Fault = Callable[["Handler", bytes], None]


class Server:
    """Serves a folder.  `faults[name]` are done to the next requests of a file, one each; `requests` counts them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.closing = Event()


class Handler(BaseHTTPRequestHandler):
    """Answers GET from the server's folder."""

    site: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.site.requests[name] += 1
        path = self.site.folder / name
        if not path.is_file():
            return self.send_error(404)
        faults = self.site.faults.get(name, [])
        fault = faults.pop(0) if faults else whole
        fault(self, path.read_bytes())

    def start(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def whole(handler: Handler, raw: bytes) -> None:
    handler.start(len(raw))
    handler.wfile.write(raw)


def slow(handler: Handler, raw: bytes) -> None:
    handler.start(len(raw))
    for at in range(0, len(raw), 1000):
        handler.wfile.write(raw[at : at + 1000])
        time.sleep(0.005)


def cut(handler: Handler, raw: bytes) -> None:
    handler.start(len(raw))
    handler.wfile.write(raw[: len(raw) // 2])


def error_500(handler: Handler, raw: bytes) -> None:
    handler.send_error(500)


def error_403(handler: Handler, raw: bytes) -> None:
    handler.send_error(403)


def wrong_bytes(handler: Handler, raw: bytes) -> None:
    whole(handler, raw[:-600] + b"\xff" + raw[-599:])


def too_many(handler: Handler, raw: bytes) -> None:
    whole(handler, raw + bytes(512))


def too_few(handler: Handler, raw: bytes) -> None:
    whole(handler, raw[:-512])


def stall(handler: Handler, raw: bytes) -> None:
    """Half of the file and then nothing."""
    handler.start(len(raw))
    handler.wfile.write(raw[: len(raw) // 2])
    handler.wfile.flush()
    handler.site.closing.wait(60)


def silent(handler: Handler, raw: bytes) -> None:
    """No answer at all."""
    handler.site.closing.wait(60)


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server of `folder` on a port of this machine."""
    handler = type("SiteHandler", (Handler,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    handler.site = site = Server(folder, f"http://127.0.0.1:{http.server_port}")
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        http.shutdown()
        http.server_close()
        thread.join()
