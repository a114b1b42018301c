"""One shard by several ranges at once, where a single stream is slow and more are faster.

Runs in: fetchers.

A shard is read as one stream first. If that is slow and much is left, two ranges are tried, then
four; they are kept only if all together are faster than half as many by a factor, so where the
server, the line or this machine is the limit it stays with one stream. What was found out holds
for the host for a while, and so does that something went wrong while several were open.

The bytes are handed on in their order: the ranges are pieces of the shard, fetched by threads into
bounded memory, and only appended to the file. So a partial file is always the shard's beginning,
and a fetch that is cut off goes on at its end, whatever was open.

A shard qualifies if its length is known and its version is a strong ETag, with which the server
compares every range. The hub's do not: it asks its users for one request per shard.
"""

from __future__ import annotations

import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from pipeline.errors import SourceError
from pipeline.redaction import redact
from pipeline.sources import Chunks, Source, Stat, TransientError

PIECE_BYTES = 16 << 20  # what waiting for a first byte is spread over
LARGE_BYTES = 64 << 20  # less than this left is not worth a trial
FAST_BYTES_PER_S = 100e6  # no stream as fast as this is slow
SETTLE_S = 0.7  # connections get up to speed before they are measured …
MEASURE_S = 1.5  # … over this long
REMEMBER_S = 600.0
_WORTH = 1.3  # times the rate of half as many, or they are not kept
_KINDS = ("http", "https", "s3", "gs", "az")
_HUB = ("huggingface.co", "hf.co")


class Ranges:
    """Reads shards; knows how many ranges each host is worth.

    Args:
        limit: Ranges of one shard at once; 1 for a single stream always.
        tell: Called with the fields of a log line, when something was found out about a host.
    """

    def __init__(self, limit: int, tell: Callable[[dict[str, object]], None]) -> None:
        self._limit, self._tell = limit, tell
        self._known: dict[str, tuple[int, float]] = {}  # host → ranges, until when
        self.lost_bytes = 0  # fetched by ranges that failed before it was their turn

    def read(self, source: Source, url: str, start: int, expected: Stat) -> Chunks:
        """The body from byte start on, in order. Raises: see Source.read."""
        host = _host(url)
        if self._limit <= 1 or host is None or not _large(expected, start):
            return source.read(start, expected)
        worth, until = self._known.get(host, (0, 0.0))
        if time.monotonic() >= until:
            worth = 0
        if worth > 1:
            crew = _Crew(source, redact(url), expected, start, worth)
            return Chunks(start, self._together(crew, source, host, expected))
        chunks = source.read(start, expected)
        return chunks if worth else Chunks(chunks.start, self._one(source, url, chunks, expected))

    def _one(self, source: Source, url: str, chunks: Chunks, expected: Stat) -> Iterator[bytes]:
        """One stream; when its rate is known, two ranges are tried behind a point ahead of it,
        and are gone over to when it has come to that point."""
        host, at, meter, crew, rate = _host(url), chunks.start, _Meter(), None, 0.0
        assert host is not None
        try:
            for piece in chunks.data:
                if crew is not None and at + len(piece) >= crew.start:
                    if crew.works():
                        yield piece[: crew.start - at]
                        break
                    self._dismiss(crew)
                    crew = None
                    self._found(host, 1, rate)
                at += len(piece)
                yield piece
                meter.at(at)
                if not rate and (rate := meter.rate) and _slow(rate) and _large(expected, at):
                    crew = _Crew(source, redact(url), expected, at + PIECE_BYTES, 2)
            else:  # it is whole, or was cut off before the point
                return
            if hasattr(chunks.data, "close"):
                chunks.data.close()
            assert crew is not None
            yield from self._together(crew, source, host, expected, rate)
        finally:
            if crew is not None:
                self._dismiss(crew)

    def _together(
        self,
        crew: _Crew,
        source: Source,
        host: str,
        expected: Stat,
        before: float | None = None,
    ) -> Iterator[bytes]:
        """Hand on what a crew fetches, growing it as long as that is worth it.

        before: bytes/s of half as many; None: nothing is tried any more.
        """
        meter = _Meter()
        try:
            for piece in crew.pieces():
                yield piece
                meter.at(crew.received)
                if before is None or not (rate := meter.rate):
                    continue
                if rate < _WORTH * before:
                    crew.shrink(crew.num // 2)
                    self._found(host, crew.num, before)
                    before = None
                elif 2 * crew.num <= self._limit:
                    before, meter = rate, _Meter()
                    crew.grow(2 * crew.num)
                else:
                    self._found(host, crew.num, rate)
                    before = None
            rest = crew.end
        except Exception:
            self._found(host, 1)  # it may be because there were several
            raise
        finally:
            self._dismiss(crew)
        if rest < _size(expected):
            yield from source.read(rest, expected).data

    def _dismiss(self, crew: _Crew) -> None:
        self.lost_bytes += crew.close()

    def _found(self, host: str, num: int, rate: float | None = None) -> None:
        """Remember how many ranges a host is worth, and tell at what rate."""
        self._known[host] = num, time.monotonic() + REMEMBER_S
        fields: dict[str, object] = {"host": host, "ranges": num}
        self._tell(fields if rate is None else fields | {"mb_per_s": round(rate / 1e6, 1)})


def _host(url: str) -> str | None:
    """What a finding holds for; None where a single stream is the rule."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme.lower() not in _KINDS or f".{host}".endswith(tuple(f".{one}" for one in _HUB)):
        return None
    return f"{parts.scheme.lower()}://{parts.netloc.rsplit('@', 1)[-1]}"


def _large(expected: Stat, at: int) -> bool:
    strong = expected.version.startswith('"')
    return strong and expected.size_bytes is not None and expected.size_bytes - at >= LARGE_BYTES


def _slow(rate: float) -> bool:
    return rate < FAST_BYTES_PER_S


def _size(expected: Stat) -> int:
    assert expected.size_bytes is not None
    return expected.size_bytes


class _Meter:
    """A rate, once it has settled and has been measured long enough; 0 before."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._bytes = 0
        self._from: tuple[float, int] | None = None
        self.rate = 0.0

    def add(self, num_bytes: int) -> None:
        self.at(self._bytes + num_bytes)

    def at(self, num_bytes: int) -> None:
        """So many bytes have come in all."""
        self._bytes, now = num_bytes, time.monotonic()
        if self.rate or now - self._begin < SETTLE_S:
            return
        if self._from is None:
            self._from = now, num_bytes
        elif now - self._from[0] >= MEASURE_S:
            self.rate = (num_bytes - self._from[1]) / (now - self._from[0])


class _Piece:
    """A part of the shard; its bytes are handed on while they come."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.data: SimpleQueue[bytes | Exception] = SimpleQueue()  # b'': it is whole


class _Crew:
    """Threads that fetch consecutive pieces, a few ahead of the one that is handed on.

    Memory: num + 1 pieces at most. A lock is shared by threads of this process alone.

    Args:
        source: Of the shard.
        name: For messages.
        expected: What it must be.
        start: Where the first piece begins.
        num: Threads, each with one range.
    """

    def __init__(self, source: Source, name: str, expected: Stat, start: int, num: int) -> None:
        self._source, self._name, self._expected = source, name, expected
        self.start = self._next = start
        self.end = _size(expected)
        self.num = 0
        self.received = 0
        self._given = 0
        self._pieces: deque[_Piece] = deque()
        self._changed = threading.Condition()
        self._answered, self._works, self._closed = threading.Event(), False, False
        self.grow(num)

    def works(self) -> bool:
        """Whether the server has sent a range; waits for its first answer, or failure."""
        self._answered.wait()
        return self._works

    def grow(self, num: int) -> None:
        """Work with so many threads from now on."""
        first, self.num = self.num, num
        for number in range(first, num):
            threading.Thread(target=self._work, args=(number,), daemon=True).start()

    def shrink(self, num: int) -> None:
        """Work with fewer; with a single one no new piece is begun, and end is where they end: a
        stream of its own costs fewer requests."""
        with self._changed:
            self.num = num
            if num == 1:
                self.end = self._next
            self._changed.notify_all()

    def close(self) -> int:
        """Stop. Returns bytes that were fetched and are not wanted any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self.received - self._given

    def pieces(self) -> Iterator[bytes]:
        """The bytes from start to end, in order. Raises: see Source.read."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self._next >= self.end)
                if not self._pieces:
                    return
                piece = self._pieces[0]
            while data := piece.data.get():
                if isinstance(data, Exception):
                    raise data
                self._given += len(data)
                yield data
            with self._changed:
                self._pieces.popleft()
                self._changed.notify_all()

    # ── threads ─────────────────────────────────────────────────────────────────────────────

    def _work(self, number: int) -> None:
        while (piece := self._take(number)) is not None:
            try:
                self._fetch(piece)
                piece.data.put(b"")
            except Exception as error:
                if isinstance(error, SourceError):  # a single stream may be let in
                    error = TransientError(error.what, remedy=error.remedy)
                piece.data.put(error)
                self._answered.set()
                with self._changed:
                    self._closed = True  # what comes behind it is not wanted
                    self._changed.notify_all()

    def _take(self, number: int) -> _Piece | None:
        """The next piece, when there is memory for it; None when this thread is not needed."""
        with self._changed:

            def over() -> bool:
                return self._closed or number >= self.num or self._next >= self.end

            self._changed.wait_for(lambda: over() or len(self._pieces) < self.num + 1)
            if over():
                return None
            piece = _Piece(self._next, min(self._next + PIECE_BYTES, self.end))
            self._next = piece.end
            self._pieces.append(piece)
            self._changed.notify_all()
            return piece

    def _fetch(self, piece: _Piece) -> None:
        chunks, at = self._source.read(piece.start, self._expected, piece.end), piece.start
        if chunks.start != piece.start:
            raise TransientError(f"{self._name}: its server sends all where a range is asked for")
        self._works = True
        self._answered.set()
        for data in chunks.data:
            if self._closed:
                break
            wanted = data[: piece.end - at]
            at += len(wanted)
            with self._changed:
                self.received += len(wanted)
            piece.data.put(wanted)
            if at == piece.end:
                return
        raise TransientError(f"{self._name}: its body ended after {at} bytes")
