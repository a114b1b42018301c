"""A stand-in for Google Cloud Storage and Azure's blobs: the few calls of their APIs that are used.

Both name an object by /bucket/key; gs lists by `list-type=2`, az by `comp=list`. It was compared
with Azurite by hand; nobody has run it beside Google's own service.
"""

from __future__ import annotations

import hashlib
import http.server
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.sax.saxutils import escape

_DATE = "Tue, 24 Nov 2026 12:00:00 GMT"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the client's acknowledgement
    objects: dict[str, bytes]
    bucket: str

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        bucket, _, key = urllib.parse.unquote(parts.path).strip("/").partition("/")
        if bucket != self.bucket:
            azure = "comp" in query or "x-ms-version" in self.headers
            code = "ContainerNotFound" if azure else "NoSuchBucket"
            self._say(404, f"<Error><Code>{code}</Code></Error>".encode())
        elif "comp" in query or "list-type" in query:
            self._list(query.get("prefix", [""])[0], azure="comp" in query)
        elif key not in self.objects:
            self._say(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._object(self.objects[key])

    def _list(self, prefix: str, *, azure: bool) -> None:
        entries = ""
        for key, data in self.objects.items():
            if not key.startswith(prefix):
                continue
            name, tag, size = escape(key), _tag(data), len(data)
            if azure:  # the quotes of the tag are left out
                entries += (
                    f"<Blob><Name>{name}</Name><Properties><Last-Modified>{_DATE}</Last-Modified>"
                    f"<Content-Length>{size}</Content-Length><Etag>{tag}</Etag>"
                    "<Content-Type>x</Content-Type></Properties></Blob>"
                )
            else:
                entries += (
                    f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>&quot;{tag}&quot;</ETag>"
                    "<LastModified>2026-11-24T12:00:00.000Z</LastModified></Contents>"
                )
        form = "<EnumerationResults><Blobs>{}</Blobs><NextMarker/></EnumerationResults>"
        if not azure:
            form = "<ListBucketResult><IsTruncated>false</IsTruncated>{}</ListBucketResult>"
        self._say(200, form.format(entries).encode())

    def _object(self, data: bytes) -> None:
        tag = f'"{_tag(data)}"'
        if self.headers.get("If-Match", tag) != tag:
            self._say(412, b"")
            return
        wanted = self.headers.get("Range", "")
        start, _, last = wanted.removeprefix("bytes=").partition("-")
        begin, end = int(start or 0), int(last) + 1 if last else len(data)
        extra = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"} if wanted else {}
        self._say(206 if wanted else 200, data[begin:end],
                  {"ETag": tag, "Last-Modified": _DATE, **extra})  # fmt: skip

    def _say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tag(data: bytes) -> str:
    return "0x" + hashlib.sha1(data).hexdigest()[:15].upper()


@contextmanager
def store_server(
    bucket: str, objects: dict[str, bytes], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve one bucket; yields the server's address."""
    handler = type("Handler", (_Handler,), {"objects": objects, "bucket": bucket})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
