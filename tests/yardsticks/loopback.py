"""A web server on this machine that serves pieces of a folder's files: a stand-in for remote shards."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class PieceHandler(BaseHTTPRequestHandler):
    """Answers ``GET`` with ``Range: bytes=A-B``.

    Args:
        folder: whose files are served.
        delay: seconds that each answer is late, as from a server that is far away.
    """

    protocol_version = "HTTP/1.1"  # connections are kept

    def __init__(self, *args: object, folder: Path, delay: float = 0.0):
        self.folder = folder
        self.delay = delay
        super().__init__(*args)  # type: ignore[arg-type]  # answers at once

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.answer(404)
            return
        size, wanted = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, path.read_bytes())
            return
        first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
        if first > last:
            self.answer(416, told=f"bytes */{size}")
            return
        with path.open("rb") as file:
            file.seek(first)
            self.answer(206, file.read(last - first + 1), f"bytes {first}-{last}/{size}")

    def answer(self, status: int, body: bytes = b"", told: str = "") -> None:
        """Sends an answer; `told` is its ``Content-Range``."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if told:
            self.send_header("Content-Range", told)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve(folder: Path, *, delay: float = 0.0, handler: type[PieceHandler] = PieceHandler) -> Iterator[str]:
    """Serves a folder on a free port of the loopback; yields its address, ``http://127.0.0.1:PORT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, folder=folder, delay=delay))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
