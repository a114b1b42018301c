"""Every parser of this project that reads foreign bytes, as a function of bytes.

A target returns for any input: with what was read, or having caught the one kind of error that
its callers expect. Anything else that comes out of it is a defect.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import pyarrow as pa
import urllib3
import yaml

from pipeline import cache as cache_folder
from pipeline import checkpoints, config, filters, http_source, settings
from pipeline.channel import Frames, frame
from pipeline.checkpoints import CheckpointState
from pipeline.errors import ConfigError, ShardError, SourceError
from pipeline.messages import ALL, BadRecord, Cursor, LaneCursor, Skip
from pipeline.sources import ChangedError, Stat, TransientError
from pipeline.workers import writer
from tests.corpus.base import TAR_END, jsonl, lz4, member, zst
from tests.corpus.nested import arrow, arrow_stream
from tests.malformed import CASES, documents

_MAX_DOCUMENTS = 100_000  # a few bytes may be very many documents: that is no defect
_MAX_BODY_BYTES = 1 << 20
_LARGEST_SEED_BYTES = 20_000


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Args:
        seeds: Inputs to begin with: sound ones, and those of the malformed shards.
        check: Feeds it one input. folder is for files; what is in it may be overwritten.
    """

    seeds: Callable[[], Sequence[bytes]]
    check: Callable[[bytes, Path], None]


# ── shards ──────────────────────────────────────────────────────────────────────────────────


def _shard(name: str) -> Callable[[bytes, Path], None]:
    def check(data: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(data)
        with suppress(ShardError):
            for count, document in enumerate(documents(path, name)):
                assert isinstance(document, bytes | BadRecord)
                if isinstance(document, bytes):
                    document.decode()
                if count > _MAX_DOCUMENTS:
                    break

    return check


def _small_tar() -> bytes:
    return b"".join(member(f"{n}.json", b'{"text": "t"}') for n in range(4)) + TAR_END


def _small_table() -> pa.Table:
    return pa.table({"text": ["a", "bc", None], "n": [1, 2, 3]})


def _conditions() -> list[bytes]:
    texts = (
        "language == 'en' and language_score >= 0.65", "not (a in ['x', 'y'] or 0.5 < b <= 1)",
        "url.startswith('https') and 'w' in url and meta.lang is not None",
        "optional(column('/tags/0')) != -3 and flag",
    )  # fmt: skip
    return [text.encode() for text in texts]


def _condition(data: bytes, folder: Path) -> None:
    batch = pa.record_batch({"url": ["a"], "a": [1], "b": [0.5], "language": ["en"]})
    with suppress(ConfigError, ShardError, UnicodeDecodeError):
        where = filters.Where(data.decode())
        where.statistics(batch.schema)
        where.check(batch.schema, "x")
        assert where.mask(batch).shape == (1,)


def _compressed(compress: Callable[[bytes], bytes]) -> Callable[[], list[bytes]]:
    return lambda: [compress(jsonl(5)), compress(_small_tar()), compress(b"") + compress(jsonl(2))]


def _cases(prefix: str, *more: Callable[[], bytes]) -> Callable[[], list[bytes]]:
    """The malformed shards of one form."""

    def seeds() -> list[bytes]:
        made = [case.make() for case in CASES if case.name.endswith(prefix)]
        small = {data for data in made if len(data) <= _LARGEST_SEED_BYTES}
        return [*(make() for make in more), *sorted(small, key=lambda d: (len(d), d))]

    return seeds


# ── messages and files of our own that a disk or a death may have altered ───────────────────


def _frames(data: bytes, folder: Path) -> None:
    frames, random_ = Frames(), random.Random(len(data))
    at = 0
    while at < len(data):
        size = random_.choice([1, 3, 50, 1000])
        frames.feed(data[at : at + size])
        at += size


def _messages() -> list[bytes]:
    """One frame of each kind, with the plainest fields that it can have."""
    plain = {int: 3, str: "x", float: 0.5, bool: True, bytes: b"x"}
    frames = []
    for kind in ALL:
        values = []
        for field in msgspec.structs.fields(kind):
            kinds = getattr(field.type, "__args__", (field.type,))
            values.append(plain.get(kinds[0], ()))
        with suppress(msgspec.MsgspecError, TypeError):
            frames.append(frame(kind(*values)))
    return [*frames, b"".join(frames)]


def _cache_name(data: bytes, folder: Path) -> None:
    entry = cache_folder.parse(data.decode("utf-8", "surrogateescape"))
    if entry is not None and entry.size_bytes is not None:
        assert cache_folder.parse(
            cache_folder.file_name(entry.key, entry.size_bytes, entry.digest or "")
        )


def _cursor() -> Cursor:
    lanes = (LaneCursor(0, 1, 2, 3), LaneCursor(4, 5, 6, 7))
    return Cursor("f" * 32, {"shards": "2"}, lanes, skips=(Skip(0, 1, 2, True, "cut"),))


def _state_file(data: bytes, folder: Path) -> None:
    (folder / checkpoints.STATE_FILE).write_bytes(data)
    with suppress(ShardError):
        checkpoints.read(folder)


def _states() -> list[bytes]:
    state = CheckpointState(5, 640, _cursor(), [1, 2], 2.5, {"name": "x"}, {"mlx": "1"})
    return [msgspec.json.encode(state)]


def _writer_file(data: bytes, folder: Path) -> None:
    (folder / writer.STATE_FILE).write_bytes(data)
    with suppress(ShardError):
        writer.read_state(folder)


def _configuration(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    with suppress(ConfigError):
        config.to_plain(settings.load(str(path), {"name": "x"}))


def _configurations() -> list[bytes]:
    plain = config.to_plain(config.Config(name="x"))
    shipped = sorted((Path(config.__file__).parent.parent / "configs").glob("*.yaml"))
    return [yaml.safe_dump(plain).encode(), *(path.read_bytes() for path in shipped)]


# ── http ────────────────────────────────────────────────────────────────────────────────────

_KNOWN = (TransientError, ChangedError, SourceError)
_HEADERS = (
    b"200\nContent-Length: 5\nETag: \"a\"\nLast-Modified: x\n",
    b"206\nContent-Range: bytes 5-9/10\nETag: W/\"a\"\nTransfer-Encoding: chunked\n",
    b"503\nRetry-After: 120\n",
    b"429\nRetry-After: Tue, 24 Nov 2026 10:00:00 GMT\n",
)  # fmt: skip


def _headers(data: bytes, folder: Path) -> None:
    """Statuses and headers as http.client hands them on: Latin-1, no line ends."""
    first, *lines = data.decode("latin-1").split("\n")
    pairs = [line.split(": ", 1) for line in lines if ": " in line]
    headers = urllib3.HTTPHeaderDict([(key.strip(), value) for key, value in pairs])
    status = int(first) if first.isascii() and first.isdigit() and len(first) == 3 else 200
    try:
        response = urllib3.HTTPResponse(b"", headers, status, preload_content=False)
    except urllib3.exceptions.HTTPError:  # as in a request: HttpSource._open knows it
        return
    source = http_source.HttpSource("http://host/x", 1)
    seconds = http_source.retry_after_s(response.headers)
    assert seconds is None or 0 <= seconds < 1e10
    with suppress(*_KNOWN):
        source._refuse(response)
        source._check(response, Stat(10, '"a"'))
        http_source._first(response)


class _Answering:
    """A server that answers every connection with the bytes it was given."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/x"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with suppress(OSError), connection:
                connection.settimeout(1)
                connection.recv(1 << 16)
                connection.sendall(self.answer)


@cache
def _answering() -> _Answering:
    return _Answering()


def _http(data: bytes, folder: Path) -> None:
    server = _answering()
    server.answer = data.replace(b"URL", server.url.encode())
    source = http_source.HttpSource(server.url, 0.5)
    with suppress(*_KNOWN):
        source.stat()
    for start in (0, 3):
        with suppress(*_KNOWN):
            size = 0
            for piece in source.read(start, Stat(5, "")).data:
                size += len(piece)
                if size > _MAX_BODY_BYTES:
                    break


_ANSWERS = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "a"\r\nConnection: close\r\n\r\nhello',
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 3-4/5\r\nContent-Length: 2\r\n\r\nlo",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: URL\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 416 Range\r\nContent-Range: bytes */3\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nabc",
    b"HTTP/1.0 200 OK\r\nLast-Modified: Tue, 24 Nov 2026 10:00:00 GMT\r\n\r\nhello",
)

TARGETS: dict[str, Target] = {
    "bz2": Target(_compressed(bz2.compress), _shard("x.jsonl.bz2")),
    "gz": Target(_compressed(gzip.compress), _shard("x.jsonl.gz")),
    "zst": Target(_compressed(zst), _shard("x.jsonl.zst")),
    "xz": Target(_compressed(lzma.compress), _shard("x.jsonl.xz")),
    "lz4": Target(_compressed(lz4), _shard("x.jsonl.lz4")),
    "tar": Target(_cases(".tar", _small_tar), _shard("x.tar")),
    "txt": Target(_cases(".txt"), _shard("x.txt")),
    "arrow": Target(_cases(".arrow", lambda: arrow(_small_table())), _shard("x.arrow")),
    "arrow-stream": Target(lambda: [arrow_stream(_small_table())], _shard("x.arrow")),
    "condition": Target(_conditions, _condition),
    "jsonl": Target(_cases(".jsonl", lambda: jsonl(5)), _shard("x.jsonl")),
    "parquet": Target(_cases(".parquet"), _shard("x.parquet")),
    "frames": Target(_messages, _frames),
    "cache-name": Target(
        lambda: [b"0123456789abcdef.partial", b"0123456789abcdef.77.fedcba9876543210.shard"],
        _cache_name,
    ),
    "state": Target(_states, _state_file),
    "writer": Target(
        lambda: [msgspec.json.encode(writer.WriterState(_cursor(), 9, 1, False))], _writer_file
    ),
    "config": Target(_configurations, _configuration),
    "headers": Target(lambda: _HEADERS, _headers),
    "http": Target(lambda: _ANSWERS, _http),
}
