"""A web server for the built pages, on this machine only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Quiet(SimpleHTTPRequestHandler):
    """Serve files, and print nothing about it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Drop a line of the log: the browser reports what failed."""


class Server(ThreadingHTTPServer):
    """A server that stays calm when the browser leaves a page before it has loaded."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Drop the traceback of a broken connection."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder at a free port while the block runs.

    Args:
        folder: The folder to serve.

    Yields:
        The origin of the server, such as ``http://127.0.0.1:34567``.
    """
    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
