"""The status server: a live page, the status as JSON, and Prometheus metrics, over HTTP.

Process: status server, a child of the supervisor that ends with it; or the command line's own,
for `status --http`. It reads the run's status file and nothing else, so that no request, however
many there are, reaches the supervisor.

    /              the live page           /status.json   what `status --json` prints
    /metrics       for Prometheus          /fragment      the page's inner part, as it is now
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from pipeline import live_page, prometheus, status_file
from pipeline.errors import ConfigError, FinewebError

_MAX_REQUESTS = 16  # at the same time; others wait in the system's queue
_TIMEOUT_S = 10.0  # a client that is slower is given up
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: Name or address, of version 4 or 6.
        port: 0 takes a free one.

    Raises:
        ConfigError: the address is not ours, or the port is taken.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"the status server cannot listen on {host} port {port}: {error.strerror}",
            "give another --http port (0 takes a free one) or --http-host",
        ) from None
    return listening


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(folder: Path, listening: socket.socket) -> None:
    """Answer requests about the run in this folder until the process ends."""
    server = _Server(folder, listening)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, listening: socket.socket) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.folder = folder
        self.only_local = _is_loopback(str(listening.getsockname()[0]))
        self._free = threading.Semaphore(_MAX_REQUESTS)

    def process_request(self, request: object, client_address: object) -> None:
        """Wait until fewer than the most are being answered."""
        self._free.acquire()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        """One request, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is no news."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "fineweb-pipeline", ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Every answer is made anew from the file."""
        if not self._is_meant():
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"ask for this machine by its name\n")
            return
        try:
            status, kind, body = self._body(urlsplit(self.path).path)
        except FinewebError as error:
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n".encode()
        self._answer(status, kind, body)

    def do_HEAD(self) -> None:
        """The same without its body."""
        self.do_GET()

    def _body(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        folder, ok = self.server.folder, HTTPStatus.OK
        match path:
            case "/":
                return ok, "text/html", live_page.page(status_file.read(folder)).encode()
            case "/fragment":
                return ok, "text/html", live_page.fragment(status_file.read(folder)).encode()
            case "/live.js":
                return ok, "text/javascript", live_page.SCRIPT.encode()
            case "/status.json":
                recorded = status_file.read(folder)
                said = {"state": status_file.state(recorded), **msgspec.to_builtins(recorded)}
                return ok, "application/json", msgspec.json.encode(said)
            case "/metrics":
                kind, body = prometheus.render(status_file.read(folder))
                return ok, kind, body
        return HTTPStatus.NOT_FOUND, "text/plain", b"there are /, /status.json and /metrics\n"

    def _is_meant(self) -> bool:
        """A page of the internet may point its own name at this machine (DNS rebinding): what
        listens on the loopback address answers to that alone."""
        if not self.server.only_local:
            return True
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        return _is_loopback(host)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        charset = "" if "charset" in kind else "; charset=utf-8"
        for name, value in {"Content-Type": f"{kind}{charset}", **_HEADERS}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the screen is the run's."""


def main() -> None:
    """python -m pipeline.web FOLDER DESCRIPTOR: ends when its standard input does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor's end is ours

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))


if __name__ == "__main__":
    main()
