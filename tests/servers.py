"""Real servers on the loopback address: HTTP that can misbehave on purpose, and S3."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import mmap
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LARGE_BYTES = 64 << 20


@dataclass
class Behaviour:
    """What a server does to a request: set by the test, read by the handler.

    Each entry is by file name; `*` is for all.
    """

    no_length: set[str] = field(default_factory=set)  # chunked, without Content-Length
    no_ranges: bool = False
    no_head: bool = False
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of each answer
    status: dict[str, list[int]] = field(default_factory=dict)  # answered first, one by one
    retry_after: str | None = None
    etag: dict[str, str] = field(default_factory=dict)
    bytes_per_s: float | None = None  # of each connection …
    wait_s: float = 0.0  # before the first byte of an answer
    line: threading.Lock | None = None  # … or of all together, which then take turns
    requests: Counter[str] = field(default_factory=Counter)  # GETs by file name
    sent: Counter[str] = field(default_factory=Counter)  # body bytes by file name
    queries: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # first bytes of the bodies that were sent


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the client's acknowledgement
    root: Path
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.behaviour.no_head:
            self._refuse(405)
        else:
            self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _refuse(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, *, body: bool) -> None:
        how = self.behaviour
        path, _, query = self.path.partition("?")
        name = path.rsplit("/", 1)[-1]
        how.queries.append(query)
        if body:
            how.requests[name] += 1
        if statuses := how.status.get(name):
            extra = {"Retry_After": how.retry_after} if how.retry_after else {}
            self._refuse(statuses.pop(0), **extra)
            return
        file = self.root / name
        if not file.is_file():
            self._refuse(404)
            return
        data = self._content(file)
        etag = how.etag[name] if name in how.etag else f'"{len(data)}-{hash(data) & 0xFFFF}"'
        if self.headers.get("If-Match", etag) != etag:
            self._refuse(412)
            return
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and not how.no_ranges:
            start, _, last = wanted[6:].partition("-")
            self._send(name, data, range(int(start), int(last) + 1 if last else len(data)), etag,
                       body)  # fmt: skip
        else:
            self._send(name, data, range(len(data)), etag, body, partial=False)

    def _content(self, file: Path) -> bytes | memoryview:
        """Mapped if it is large: several connections then have no copies of it."""
        size = file.stat().st_size
        if size < _LARGE_BYTES:
            return file.read_bytes()
        with file.open("rb") as opened:
            return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))

    def _send(
        self,
        name: str,
        data: bytes | memoryview,
        part: range,
        etag: str,
        body: bool,
        *,
        partial: bool = True,
    ) -> None:
        how = self.behaviour
        chunked = name in how.no_length or "*" in how.no_length
        time.sleep(how.wait_s)
        self.send_response(206 if partial else 200)
        self.send_header("ETag", etag)
        if partial:
            self.send_header("Content-Range", f"bytes {part.start}-{part.stop - 1}/{len(data)}")
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            if chunked:
                self.close_connection = True
            return
        how.starts.append(part.start)
        limit = how.cut_after.get(name)
        rest = data[part.start : part.stop]
        cut = limit is not None and limit < len(rest)
        rest = rest[:limit]
        step = max(1 << 14, int((how.bytes_per_s or 0) / 200))  # naps are not shorter than 5 ms
        for at in range(0, len(rest), step):
            piece = rest[at : at + step]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            how.sent[name] += len(piece)
            if how.bytes_per_s:
                with how.line or nullcontext():
                    time.sleep(len(piece) / how.bytes_per_s)
        if cut:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")


class Tls:
    """A self-signed certificate for 127.0.0.1.

    Args:
        folder: Where its files are written.
    """

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(key, hashes.SHA256())
        )
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(pem, form, serialization.NoEncryption())
        self.certificate, both = folder / "certificate.pem", folder / "both.pem"
        self.certificate.write_bytes(made.public_bytes(pem))
        both.write_bytes(secret + made.public_bytes(pem))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(both)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what the tests are about."""


@contextmanager
def http_server(
    root: Path, behaviour: Behaviour | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve a folder; yields its URL."""
    how = behaviour or Behaviour()
    handler = type("Handler", (_Handler,), {"root": root, "behaviour": how})
    with _Server(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextmanager
def s3_server(bucket: str, objects: dict[str, bytes]) -> Iterator[dict[str, str]]:
    """moto's S3 server with one bucket; yields the AWS variables that lead to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key-that-is-secret",
        "AWS_SECRET_ACCESS_KEY": "password-that-is-secret",
        "AWS_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=bucket)
    for key, data in objects.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)
    try:
        yield variables
    finally:
        server.stop()


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that must happen, with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
