"""The campaign's remote side: the demonstration's corpus over HTTP, which fails when it is told to.

Runs in: chaos, as threads: it outlives every run of the campaign, because its address is part of
the stream.
"""

from __future__ import annotations

import functools
import http.server
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.demo import DemoHandler

STALL_S = 4.0  # longer than the campaign's timeout_s: the client gives the connection up
FAULTS = ("reset", "503", "stall")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close sends RST


class FaultyServer(http.server.ThreadingHTTPServer):
    """Counts what it sends; the next answers fail as many times as asked for."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.sent_bytes = 0
        self._lock = threading.Lock()
        self._due: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail_next(self, fault: str, count: int) -> None:
        """Let the next count answers fail, one of FAULTS."""
        with self._lock:
            self._due += [fault] * count

    def take(self) -> str | None:
        """The fault of this answer, if one is due."""
        with self._lock:
            return self._due.pop(0) if self._due else None

    def count(self, sent_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += sent_bytes

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed hangs up: nothing to say about it."""


class _Handler(DemoHandler):
    server: FaultyServer

    def do_GET(self) -> None:  # noqa: N802 - the standard library's name
        fault = self.server.take()
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.fault = fault
        super().do_GET()

    def send_body(self, data: bytes) -> None:
        half = len(data) // 2 if self.fault else len(data)
        self.wfile.write(data[:half])
        self.server.count(half)
        if self.fault == "stall":
            time.sleep(STALL_S)
        if self.fault:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """Serve the folder until the block ends."""
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
