"""Process: fetcher. One shard at a time from its source into the cache.

Not one byte is written beyond what the supervisor has set aside. A fetch that was cut off goes on
where its partial file ends, if the source still has the same version.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from pipeline import cache
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.errors import SourceError
from pipeline.faults import faultpoint
from pipeline.messages import (
    Fetch,
    FetcherSetup,
    FetchFailed,
    FetchProgress,
    Grant,
    Log,
    ReserveMore,
    ShardFetched,
)
from pipeline.ranges import Ranges
from pipeline.sources import (
    CHUNK_BYTES,
    ChangedError,
    Patience,
    Source,
    Stat,
    TransientError,
    open_source,
)

_PROGRESS_S = 0.25
_LOG_S = 5.0  # between lines on one fetcher's retries
_SIGN_OF_LIFE_S = 10.0
_MAX_CHANGES = 3  # a shard that changes under us this often is being written


class Fetcher:
    """Fetches shards into one folder.

    Args:
        channel: To the supervisor.
        setup: First message.
    """

    def __init__(self, channel: Channel, setup: FetcherSetup) -> None:
        self._channel = channel
        self._folder = Path(setup.cache_dir)
        self._options: dict[str, Any] = setup.source_options
        self._ranges = Ranges(
            int(self._options.get("max_ranges", 1)),
            lambda fields: channel.send(Log("info", "ranges_measured", fields)),
        )
        self._reported = self._logged = -_LOG_S
        self._refetched = 0

    def run(self) -> None:
        """Serve until the supervisor hangs up."""
        while True:
            message = self._channel.receive()
            if not isinstance(message, Fetch):
                raise TypeError(f"the fetcher got {message!r}")
            try:
                self._channel.send(self._fetch(message))
            except SourceError as error:
                self._channel.send(FetchFailed(message.shard, error.what, error.remedy))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                what = f"the disk of {self._folder} is full: {error.strerror}"
                remedy = "fetching waits; free some space or lower --max-disk"
                self._channel.send(FetchFailed(message.shard, what, remedy, disk_full=True))

    def _fetch(self, fetch: Fetch) -> ShardFetched:
        """Bring one shard in; what it raises is final."""
        whole = self._already_whole(fetch)
        if whole is not None:
            return whole
        self._refetched, lost_before = 0, self._ranges.lost_bytes
        path = self._folder / cache.partial_name(fetch.key)
        patience, changes = Patience(int(self._options["max_retries"])), 0
        with path.open("a+b") as file:
            body = _Body(self._channel, fetch, file)
            source = open_source(fetch.url, self._options)
            while True:
                pace = _Pace(fetch.name, self._options)
                try:
                    self._read(source, fetch, body, pace)
                    body.check()
                    break
                except ChangedError as error:
                    changes += 1
                    if changes >= _MAX_CHANGES:
                        what = f"{error}: it is not what was found when the run began"
                        raise SourceError(what, error.remedy) from None
                    self._refetched += body.start_over()
                except TransientError as error:
                    if pace.was_enough():
                        patience.progress()
                    self._wait(fetch, body, patience.pause_s(error), error)
            self._refetched += self._ranges.lost_bytes - lost_before
            return self._finish(fetch, body, path)

    def _wait(self, fetch: Fetch, body: _Body, pause_s: float, error: TransientError) -> None:
        """Wait before the next attempt, and let it be known: a silent worker is taken for dead."""
        now = time.monotonic()
        if now - self._logged >= _LOG_S:
            self._logged = now
            fields = {"shard": fetch.name, "why": str(error), "wait_s": round(pause_s, 1)}
            self._channel.send(Log("warning", "fetch_tried_again", fields))
        until = now + pause_s
        while (left := until - time.monotonic()) > 0:
            self._channel.send(FetchProgress(fetch.shard, body.have))
            time.sleep(min(left, _SIGN_OF_LIFE_S))

    def _read(self, source: Source, fetch: Fetch, body: _Body, pace: _Pace) -> None:
        """One attempt: from the end of the partial file to the end of the shard."""
        if fetch.size_bytes is not None and body.have == fetch.size_bytes:
            return
        expected = Stat(fetch.size_bytes, fetch.version)
        chunks = self._ranges.read(source, fetch.url, body.have, expected)
        if chunks.start != body.have:
            self._refetched += body.start_over()
        for chunk in pace.timed(chunks.data):
            faultpoint("fetcher:mid_write")
            body.write(chunk)
            now = time.monotonic()
            if now - self._reported >= _PROGRESS_S:
                self._reported = now
                self._channel.send(FetchProgress(fetch.shard, body.have))
        if fetch.size_bytes is not None and body.have < fetch.size_bytes:
            raise TransientError(f"{fetch.name}: its body ended after {body.have} bytes")

    def _finish(self, fetch: Fetch, body: _Body, path: Path) -> ShardFetched:
        """Make the file durable and give it its name, which says what its bytes must be."""
        body.file.flush()
        os.fsync(body.file.fileno())
        name = cache.file_name(fetch.key, body.have, body.digest.hexdigest())
        faultpoint("fetcher:before_rename")
        path.rename(self._folder / name)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        faultpoint("fetcher:after_rename")
        return ShardFetched(fetch.shard, name, body.have, self._refetched)

    def _already_whole(self, fetch: Fetch) -> ShardFetched | None:
        """An earlier fetcher may have died between its rename and its message."""
        for path in self._folder.glob(f"{fetch.key}.*.shard"):
            entry = cache.parse(path.name)
            if entry is not None and entry.size_bytes == path.stat().st_size:
                return ShardFetched(fetch.shard, path.name, entry.size_bytes)
        return None


class _Pace:
    """How fast one attempt is: one that is slower than it must be is given up, and does not
    count as progress. Only waiting for the network counts, not for the disk or for a grant.

    Args:
        name: Of the shard.
        options: min_bytes_per_s, and timeout_s, over which it is measured.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._name = name
        self._min_bytes_per_s = float(options["min_bytes_per_s"])
        self._window_s = float(options["timeout_s"])
        self._bytes = 0
        self._waited_s = self._since_s = 0.0
        self._asked = time.monotonic()
        self._since_bytes = 0

    def timed(self, data: Iterator[bytes]) -> Iterator[bytes]:
        """The same data. Raises: TransientError, if they come too slowly."""
        while True:
            piece = next(data, b"")
            now = time.monotonic()
            self._waited_s += now - self._asked
            self._bytes += len(piece)
            if not piece:
                return
            self._check()
            yield piece
            self._asked = time.monotonic()

    def _check(self) -> None:
        span_s = self._waited_s - self._since_s
        if span_s < self._window_s:
            return
        if self._bytes - self._since_bytes < self._min_bytes_per_s * span_s:
            raise TransientError(
                f"{self._name}: slower than {self._min_bytes_per_s:g} B/s for {span_s:.0f} s",
                remedy="lower data.stream.min_bytes_per_s if your network is that slow",
            )
        self._since_s, self._since_bytes = self._waited_s, self._bytes

    def was_enough(self) -> bool:
        """Whether the attempt has made progress."""
        return self._bytes > self._min_bytes_per_s * self._waited_s


class _Body:
    """The partial file: what it has, its digest, and how far it may grow."""

    def __init__(self, channel: Channel, fetch: Fetch, file: BinaryIO) -> None:
        self._channel, self._fetch, self.file = channel, fetch, file
        self._limit = fetch.limit_bytes
        self._forget()
        file.seek(0)
        while data := file.read(CHUNK_BYTES):  # what an earlier fetcher has left
            self._take(data)

    def _forget(self) -> None:
        self.have, self.digest = 0, xxhash.xxh3_64()
        self._sha256 = None if self._fetch.sha256 is None else hashlib.sha256()

    def _take(self, data: bytes | memoryview) -> None:
        """These bytes stand in the file."""
        self.digest.update(data)
        if self._sha256 is not None:
            self._sha256.update(data)
        self.have += len(data)

    def check(self) -> None:
        """Compare the whole file's SHA-256 with the one that is known. Raises: ChangedError."""
        if self._sha256 is not None and self._sha256.hexdigest() != self._fetch.sha256:
            raise ChangedError(
                f"{self._fetch.name} has the SHA-256 {self._sha256.hexdigest()}, "
                f"and should have {self._fetch.sha256}",
                "the shard or its manifest is wrong: make one of them again; --max-bad-shards "
                "lets the run go on without it",
            )

    def start_over(self) -> int:
        """Throw away what there is; returns how much that was."""
        lost = self.have
        self.file.seek(0)
        self.file.truncate()
        self._forget()
        return lost

    def write(self, chunk: bytes) -> None:
        """Append, waiting for a larger grant where the reservation is used up."""
        size = self._fetch.size_bytes
        if size is not None and self.have + len(chunk) > size:
            raise ChangedError(f"{self._fetch.name} is longer than {size} bytes")
        view = memoryview(chunk)
        while view:
            room = self._limit - self.have
            if room <= 0:
                self._ask_for_more()
                continue
            piece = view[:room]
            self.file.write(piece)
            self.file.flush()
            self._take(piece)
            view = view[len(piece) :]

    def _ask_for_more(self) -> None:
        self._channel.send(ReserveMore(self._fetch.shard, self.have))
        answer = self._channel.receive()
        if not isinstance(answer, Grant):
            raise TypeError(f"the fetcher got {answer!r} instead of a grant")
        self._limit = answer.limit_bytes


def main(channel: Channel, descriptors: Descriptors) -> None:
    """Run one fetcher."""
    setup = channel.receive()
    assert isinstance(setup, FetcherSetup)
    Fetcher(channel, setup).run()
