"""A stand-in for the Hugging Face hub on the loopback address, which speaks its real API.

Listing in pages, paths-info, resolve with a redirect to another host (the CDN: a server of
tests/servers.py), ETag and X-Linked-ETag, error codes, 401 and 429, as the hub answered when this
was written. Files that are larger than a few bytes are LFS files, as there.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.servers import Behaviour, http_server

_LFS_BYTES = 10
COMMIT = "c0ffee" * 6 + "c0ff"
OLD = "01d" * 13 + "0"


@dataclass
class Hub:
    """What the hub has and how it behaves; set by the test, read by the handler."""

    url: str = ""
    cdn: Behaviour = field(default_factory=Behaviour)
    cdn_url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # of data set owner/name, revision main
    old: dict[str, bytes] = field(default_factory=dict)  # of its revision v1
    private: str | None = None  # the token that opens it
    gated: bool = False
    page: int = 1000  # entries of a listing's page
    next_host: str | None = None  # of the address of the next page
    limited: int = 0  # requests that are answered with 429
    requests: list[str] = field(default_factory=list)  # method and path with query
    tokens: list[str | None] = field(default_factory=list)

    def digest(self, path: str) -> str:
        """The SHA-256 by which the hub knows an LFS file."""
        return hashlib.sha256(self.files[path]).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer waits 40 ms for the client's acknowledgement
    hub: Hub
    store: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(b"")

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers["Content-Length"])))

    def _serve(self, sent: bytes) -> None:
        hub = self.hub
        hub.requests.append(f"{self.command} {self.path}")
        hub.tokens.append(self.headers.get("Authorization"))
        if hub.limited:
            hub.limited -= 1
            limits = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";q=1;w=300'}
            self._say(429, limits)
            return
        url = urllib.parse.urlsplit(self.path)  # a whole address, if it comes through a proxy
        path, query = url.path, url.query
        match path.strip("/").split("/", 5 if path.startswith("/api") else 4):
            case ["api", "datasets", "owner", "name", "revision", revision]:
                if (files := self._open(revision)) is not None:
                    self._json({"id": "owner/name", "sha": self._commit(files)})
            case ["api", "datasets", "owner", "name", "tree", rest]:
                revision, _, folder = rest.partition("/")
                if (files := self._open(revision)) is not None:
                    self._tree(files, urllib.parse.unquote(folder), urllib.parse.parse_qs(query))
            case ["api", "datasets", "owner", "name", "paths-info", revision]:
                if (files := self._open(revision)) is not None:
                    wanted = urllib.parse.parse_qs(sent.decode())["paths"]
                    self._json([one for name in wanted for one in self._info(files, name)])
            case ["datasets", "owner", "name", "resolve", rest]:
                revision, _, name = rest.partition("/")
                if (files := self._open(revision)) is not None:
                    self._resolve(files, urllib.parse.unquote(name))
            case _:
                self._say(401 if self.headers.get("Authorization") is None else 404,
                          {"X-Error-Code": "RepoNotFound"})  # fmt: skip

    def _open(self, revision: str) -> dict[str, bytes] | None:
        """The files of a revision, if the client may see them."""
        hub, token = self.hub, self.headers.get("Authorization")
        if hub.private and token != f"Bearer {hub.private}":
            status, code = (401, "RepoNotFound") if token is None else (404, "RepoNotFound")
            self._say(status, {"X-Error-Code": code})
        elif hub.gated and "/resolve/" in self.path:
            self._say(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        elif revision in ("main", COMMIT):
            return hub.files
        elif revision in ("v1", OLD):
            return hub.old
        else:
            self._say(404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _commit(self, files: dict[str, bytes]) -> str:
        return OLD if files is self.hub.old else COMMIT

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        at = f"{folder}/" if folder else ""
        below = [name for name in files if name.startswith(at)]
        if folder and not below:
            self._say(404, {"X-Error-Code": "EntryNotFound"})
            return
        deep = query["recursive"] == ["true"] or query["recursive"] == ["True"]
        names = {name if deep else at + name[len(at) :].split("/")[0] for name in below}
        entries = [one for name in sorted(names) for one in self._info(files, name)]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            query["cursor"] = [str(start + self.hub.page)]
            rest = urllib.parse.urlencode(query, doseq=True)
            path = f"{urllib.parse.urlsplit(self.path).path}?{rest}"
            headers["Link"] = f'<{self.hub.next_host or self.hub.url}{path}>; rel="next"'
        self._json(entries[start : start + self.hub.page], headers)

    def _info(self, files: dict[str, bytes], name: str) -> Iterator[dict[str, Any]]:
        if name in files:
            data = files[name]
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            one: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data), "path": name}
            if len(data) > _LFS_BYTES:
                sha256 = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            yield one
        elif any(one.startswith(f"{name}/") for one in files):
            yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}

    def _resolve(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._say(404, {"X-Error-Code": "EntryNotFound"})
            return
        data, commit = files[name], {"X-Repo-Commit": self._commit(files)}
        if len(data) <= _LFS_BYTES:
            (info,) = self._info(files, name)
            self._say(200, {"ETag": f'"{info["oid"]}"', **commit}, data)
            return
        digest = hashlib.sha256(data).hexdigest()
        (self.store / digest).write_bytes(data)
        linked = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        to = f"{self.hub.cdn_url}/{digest}?X-Amz-Signature=signature-that-is-secret"
        self._say(302, {"Location": to, **linked, **commit})

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._say(200, {"Content-Type": "application/json", **(headers or {})},
                  json.dumps(value).encode())  # fmt: skip

    def _say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub_server(
    folder: Path, files: dict[str, bytes], tls: ssl.SSLContext | None = None, **how: Any
) -> Iterator[Hub]:
    """Serve one data set, owner/name, with its CDN beside it; folder is the CDN's."""
    hub = Hub(files=files, **how)
    handler = type("Handler", (_Handler,), {"hub": hub, "store": folder})
    folder.mkdir(exist_ok=True)
    with (
        http_server(folder, hub.cdn, tls) as hub.cdn_url,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        hub.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
