"""The demonstration's remote side: a corpus from this machine's own Python, served over HTTP.

Runs in: supervisor (makes the corpus, starts the server); `python -m pipeline.demo FOLDER PORT
FD` is the server. Nothing is downloaded: the text is real English and Python, the shards have
FineWeb's form, and they come over real HTTP from a process of their own.
"""

from __future__ import annotations

import ast
import functools
import http.server
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset

_NUM_SHARDS = 96
_MAX_SOURCE_BYTES = 30_000  # longer modules become several documents
_START_S = 20.0


# ── the corpus ──────────────────────────────────────────────────────────────────────────────


def documents() -> Iterator[tuple[str, str]]:
    """(where from, text) of the language reference, then docstring and source of every module."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield f"pydoc:{topic}", text
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(inside.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):  # a module kept for its errors
            continue
        strings = [
            doc
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and (doc := ast.get_docstring(node))
        ]
        if strings:
            yield f"docstrings:{inside}", "\n\n".join(strings)
        for number in range(0, len(source), _MAX_SOURCE_BYTES):
            yield f"source:{inside}:{number}", source[number : number + _MAX_SOURCE_BYTES]


def make_corpus(folder: Path) -> dict[str, int]:
    """Write the corpus as tar.bz2 shards of FineWeb's form, unless this Python's is there.

    Returns:
        documents, text_bytes, shard_bytes, shards.
    """
    stamp = folder / "corpus.json"
    if stamp.exists():
        facts: dict[str, int] = json.loads(stamp.read_text())
        if facts.pop("python") == sys.hexversion:
            return facts
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts: list[list[tuple[str, str]]] = [[] for _ in range(_NUM_SHARDS)]
    loads = [0] * _NUM_SHARDS
    for where, text in documents():
        shard = loads.index(min(loads))
        parts[shard].append((where, text))
        loads[shard] += len(text)
    count = 0
    for number, part in enumerate(parts):
        path = partial / f"shard-{number:05d}.tar.bz2"
        with webdataset.TarWriter(str(path), compress="bz2") as tar:
            for where, text in part:
                record = {"text": text, "id": f"<demo:{count:06d}>", "url": where, "dump": "python"}
                tar.write({"__key__": f"{count:06d}", "json": record})
                count += 1
    facts = {
        "documents": count,
        "text_bytes": sum(len(text.encode()) for part in parts for _, text in part),
        "shard_bytes": sum(path.stat().st_size for path in partial.glob("*.tar.bz2")),
        "shards": _NUM_SHARDS,
    }
    (partial / stamp.name).write_text(json.dumps({"python": sys.hexversion, **facts}))
    partial.rename(folder)
    return facts


# ── the server ──────────────────────────────────────────────────────────────────────────────


class DemoHandler(http.server.SimpleHTTPRequestHandler):
    """Files with ETag and ranges, which the standard handler does not have."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the run."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        etag, start = f'"{len(data):x}-{path.stat().st_mtime_ns:x}"', 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and wanted.endswith("-"):
            start = int(wanted[6:-1])
        if self.headers.get("If-Match", etag) != etag:
            self.send_error(412)
            return
        if start >= len(data) and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.send_body(data[start:])

    def send_body(self, data: bytes) -> None:
        """What is left of the file."""
        self.wfile.write(data)


def _serve(folder: str, port: int, parent: socket.socket) -> None:
    """Serve until the parent hangs up, at the wanted port if it is free; tells it the port."""
    handler = functools.partial(DemoHandler, directory=folder)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        parent.sendall(f"{server.server_address[1]}\n".encode())
        poll = select.poll()
        poll.register(parent, 0)  # only the hang-up
        poll.poll()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, bool]]:
    """Serve a folder from a process of its own, which ends with this one.

    Yields:
        Its URL, and whether that is the one of the last time: addresses are part of the stream,
        so only then can a run be resumed.
    """
    ours, theirs = socket.socketpair()
    note = folder / "port"
    before = note.read_text() if note.exists() else "0"
    with ours:
        command = [sys.executable, "-m", "pipeline.demo", str(folder), before]
        command.append(str(theirs.fileno()))
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
        )
        theirs.close()
        ours.settimeout(_START_S)
        port = ours.makefile().readline().strip()
        note.write_text(port)
        try:
            yield f"http://127.0.0.1:{port}", port == before
        finally:
            ours.close()
            process.kill()
            process.wait()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
