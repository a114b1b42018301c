"""One shard through catalog and fetcher in this process, over real sockets, as in a run."""

from __future__ import annotations

import datetime
import email.utils
import socket
import threading
import time
from pathlib import Path

import numpy as np

from pipeline import catalog
from pipeline.channel import Channel, ClosedError
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
from pipeline.workers.fetcher import Fetcher

OPTIONS = {"timeout_s": 5.0, "max_retries": 3, "min_bytes_per_s": 0.0}
NAME = "shard.bin"
DATA = np.random.default_rng(1).bytes(300_000)


class Fetched:
    """One shard through catalog and fetcher, as in a run.

    Args:
        folder: Of the cache.
        url: Of the shard.
        options: Beside OPTIONS.
    """

    def __init__(self, folder: Path, url: str, **options: float) -> None:
        folder.mkdir(exist_ok=True)
        settings = OPTIONS | options
        (shard,) = catalog.build([url], settings)
        ours, theirs = socket.socketpair()
        fetcher = Fetcher(Channel(theirs), FetcherSetup(str(folder), settings))
        self._errors: list[BaseException] = []
        self.logs: list[Log] = []
        begin = time.monotonic()
        thread = threading.Thread(target=self._serve, args=(fetcher,), daemon=True)
        thread.start()
        supervisor = Channel(ours)
        limit = shard.size_bytes or 1 << 16
        size, version, sha256 = shard.size_bytes, shard.version, shard.sha256
        supervisor.send(Fetch(0, shard.url, shard.name, shard.key, size, version, limit, sha256))
        self.answer = self._answer(supervisor, limit)
        self.seconds = time.monotonic() - begin
        ours.close()
        thread.join(10)
        assert not self._errors
        self.path = folder / getattr(self.answer, "file_name", "")

    def _serve(self, fetcher: Fetcher) -> None:
        try:
            fetcher.run()
        except ClosedError:
            pass
        except BaseException as error:
            self._errors.append(error)
            raise

    def _answer(self, supervisor: Channel, limit: int) -> ShardFetched | FetchFailed:
        while True:
            message = supervisor.receive(timeout_s=30)
            match message:
                case ShardFetched() | FetchFailed():
                    return message
                case ReserveMore():
                    limit += 1 << 16
                    supervisor.send(Grant(0, limit))
                case Log():
                    self.logs.append(message)
                case FetchProgress():
                    pass
                case _:
                    raise AssertionError(f"{message!r} {self._errors}")

    def ok(self) -> ShardFetched:
        """Assert that the shard is here, to the byte."""
        answer = self.done()
        assert self.path.read_bytes() == DATA
        return answer

    def done(self) -> ShardFetched:
        """What was fetched, if it was."""
        assert isinstance(self.answer, ShardFetched), self.answer
        return self.answer

    def failed(self, what: str) -> FetchFailed:
        """Assert that it was given up, with an error that names shard and remedy."""
        assert isinstance(self.answer, FetchFailed), self.answer
        assert NAME in self.answer.what
        assert what in self.answer.what
        assert self.answer.remedy
        return self.answer


def in_seconds(seconds: float) -> str:
    """A date for Retry-After."""
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(when, usegmt=True)
