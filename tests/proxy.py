"""A real proxy on the loopback address that does to an answer what networks and servers do.

It stands in front of a server of tests/servers.py. Every request is a TCP connection of its own;
the test's plan says what happens to each answer, down to the byte.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_PIECE_BYTES = 1 << 12
_SEND_BUFFER_BYTES = 1 << 14  # a reset loses what has been sent and not taken: keep that little


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    method: str
    name: str  # the path's last part
    headers: dict[str, str]  # names in lower case

    @property
    def start(self) -> int:
        """First byte of the range, 0 without one."""
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])


@dataclass(frozen=True)
class Fault:
    """What happens to one answer; offsets count from its first byte, headers included."""

    reset_at: int | None = None  # then a TCP reset
    close_at: int | None = None  # then an orderly close
    stall_at: int | None = None  # then silence, until the client hangs up
    bytes_per_s: float | None = None
    answer: bytes | None = None  # instead of the server's
    head: Callable[[bytes], bytes] | None = None  # rewrites status line and headers
    drop: frozenset[str] = frozenset()  # headers of the request that the server does not get

    @property
    def end(self) -> int | None:
        """Bytes of the answer that are let through."""
        ends = (self.reset_at, self.close_at, self.stall_at)
        return next((at for at in ends if at is not None), None)


NONE = Fault()
Plan = Callable[[Request], Fault | None]


@dataclass
class Proxy:
    """What a test sees of a running proxy."""

    url: str
    plan: Plan
    upstream: tuple[str, int]
    requests: list[Request] = field(default_factory=list)
    faults: int = 0  # that were carried out
    sent: Counter[str] = field(default_factory=Counter)  # bytes of GET answers' bodies, by name

    def gets(self, name: str) -> list[Request]:
        """All GETs of one file, in order."""
        return [one for one in self.requests if one.method == "GET" and one.name == name]


def in_turn(*faults: Fault | None, name: str | None = None) -> Plan:
    """These faults for the GETs (of one file), one after the other, then none."""
    left = list(faults)
    lock = threading.Lock()

    def plan(request: Request) -> Fault | None:
        with lock:
            wanted = request.method == "GET" and name in (None, request.name)
            return left.pop(0) if wanted and left else None

    return plan


def always(fault: Fault, *methods: str) -> Plan:
    """The same fault for every request of these methods, or of any."""
    return lambda request: fault if request.method in methods or not methods else None


def header(name: str, value: str | None) -> Callable[[bytes], bytes]:
    """Rewrites an answer's head: a header's value, or None to take it away."""

    def rewrite(head: bytes) -> bytes:
        lines = head.split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(f"{name.lower()}:".encode())]
        if value is not None:
            kept.insert(1, f"{name}: {value}".encode())
        return b"\r\n".join(kept)

    return rewrite


def simple(status: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer; underscores in header names stand for hyphens."""
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


class _Handler(socketserver.BaseRequestHandler):
    proxy: Proxy
    request: socket.socket

    def handle(self) -> None:
        head = _head(self.request)
        if not head:
            return
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        headers = {key.lower(): value for key, value in pairs}
        name = urllib.parse.urlsplit(path).path.rsplit("/", 1)[-1]
        request = Request(method, name, headers)
        self.proxy.requests.append(request)
        fault = self.proxy.plan(request) or NONE
        self.proxy.faults += fault is not NONE
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if fault.answer is not None:
            self._relay(iter([fault.answer]), fault, request, 0)
            return
        kept = {k: v for k, v in headers.items() if k not in fault.drop and k != "connection"}
        asked = [lines[0], *(f"{key}: {value}" for key, value in kept.items())]
        with socket.create_connection(self.proxy.upstream, 10) as server:
            server.sendall("\r\n".join([*asked, "Connection: close", "", ""]).encode("latin-1"))
            left = int(headers.get("content-length", 0))
            while left and (piece := self.request.recv(min(left, _PIECE_BYTES))):
                server.sendall(piece)
                left -= len(piece)
            head = _head(server)
            if fault is NONE:  # the next request may be of a client that would use it again
                head = header("Connection", "close")(head)
            head = fault.head(head) if fault.head else head
            body = iter(lambda: server.recv(_PIECE_BYTES), b"")
            self._relay((piece for pieces in ([head], body) for piece in pieces), fault, request,
                        len(head))  # fmt: skip

    def _relay(
        self, pieces: Iterator[bytes], fault: Fault, request: Request, head_bytes: int
    ) -> None:
        """Send the answer as far as the fault lets it through."""
        sent = 0
        try:
            for piece in pieces:
                rest = piece if fault.end is None else piece[: fault.end - sent]
                self.request.sendall(rest)
                sent += len(rest)
                if fault.bytes_per_s:
                    time.sleep(len(rest) / fault.bytes_per_s)
                if fault.end is not None and sent >= fault.end:
                    break
        finally:
            if request.method == "GET":
                self.proxy.sent[request.name] += max(0, sent - head_bytes)
        if fault.stall_at is not None:
            self.request.settimeout(20)
            self.request.recv(1)  # returns when the client hangs up
        if fault.reset_at is not None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()


def _head(sock: socket.socket) -> bytes:
    """Up to the empty line, byte by byte, so that the body stays in the socket."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            break
        head += byte
    return head


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what the tests are about."""


@contextmanager
def fault_proxy(server_url: str, plan: Plan = lambda request: None) -> Iterator[Proxy]:
    """Stand in front of a server."""
    parts = urllib.parse.urlsplit(server_url)
    proxy = Proxy("", plan, (parts.hostname or "", parts.port or 80))
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield proxy
        finally:
            server.shutdown()
