"""Shards as files of this disk, inside a byte budget, for commands that are no run.

Runs in: the command line's own process, in threads. A shard that is not there is fetched by the
run's own kind of fetcher, a process that is told how far it may write; bytes are set aside before.
"""

from __future__ import annotations

import selectors
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import cache, spawn
from pipeline.catalog import Shard, local_path
from pipeline.errors import (
    BudgetError,
    DiskError,
    ExitCode,
    FinewebError,
    SourceError,
    StoppedError,
    WorkerCrashError,
)
from pipeline.generation import evict_files
from pipeline.messages import (
    Failed,
    Fetch,
    FetcherSetup,
    FetchFailed,
    Grant,
    Message,
    ReserveMore,
    ShardFetched,
)

_STEP_BYTES = 16 << 20  # growth of a shard of unknown length
_LOOK_S = 0.25  # between looks at whether all is called off


class ShardFiles:
    """The files of one cache folder, which the caller owns.

    Args:
        folder: Of the cache.
        lock_fd: Its lock, which fetchers inherit.
        budget_bytes: For all files in it.
        source_options: See pipeline/sources.py.
    """

    def __init__(
        self, folder: Path, lock_fd: int, budget_bytes: int, source_options: dict[str, Any]
    ) -> None:
        self._folder, self._lock_fd, self._budget = folder, lock_fd, budget_bytes
        self._options = source_options
        contents = cache.scan(folder)
        self._whole = {key: whole.path for key, whole in contents.complete.items()}
        self._bytes = {key: whole.size_bytes for key, whole in contents.complete.items()}
        for key, size in contents.partial.items():
            self._bytes.setdefault(key, size)
        self._users: Counter[str] = Counter()
        self._waiting = 0
        self._changed = threading.Condition()
        self._fetching: dict[str, threading.Lock] = {}
        self._stopped = False
        self.fetched = 0

    def stop(self) -> None:
        """Call everything off that waits or fetches."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @contextmanager
    def use(self, shard: Shard) -> Iterator[str]:
        """The shard's path; its file stays while the block lasts.

        Raises:
            BudgetError: there is no room for it, whatever else is deleted.
            SourceError: it cannot be fetched.
        """
        path = local_path(shard.url)
        if path is not None:
            yield path
            return
        with self._changed:
            self._users[shard.key] += 1
            alone = self._fetching.setdefault(shard.key, threading.Lock())
        try:
            with alone:
                if shard.key not in self._whole:
                    self._whole[shard.key] = self._fetch(shard)
            yield str(self._whole[shard.key])
        finally:
            with self._changed:
                self._users[shard.key] -= 1
                self._changed.notify_all()

    def drop(self, shard: Shard) -> None:
        """Delete a fetched file that nobody uses: it is not needed again."""
        with self._changed:
            if self._bytes.get(shard.key) is not None and not self._users[shard.key]:
                self._evict(shard.key)

    # ── bytes ───────────────────────────────────────────────────────────────────────────────

    def _reserve(self, shard: Shard, total_bytes: int) -> None:
        """Set bytes aside for a file, deleting files that nobody uses, and waiting for others."""
        with self._changed:
            while not self._stopped:
                others = sum(size for key, size in self._bytes.items() if key != shard.key)
                if others + total_bytes <= self._budget:
                    self._bytes[shard.key] = total_bytes
                    return
                idle = sorted(key for key in self._bytes if not self._users[key])
                if idle:
                    self._evict(idle[0])
                    continue
                self._waiting += 1
                try:
                    if self._waiting == sum(map(bool, self._users.values())):
                        raise _no_room(shard, total_bytes, self._budget)
                    self._changed.wait()
                finally:
                    self._waiting -= 1
        raise StoppedError("stopped", "nothing is lost")

    def _evict(self, key: str) -> None:
        evict_files(self._folder, key)
        self._whole.pop(key, None)
        del self._bytes[key]

    # ── one fetch ───────────────────────────────────────────────────────────────────────────

    def _fetch(self, shard: Shard) -> Path:
        have = self._bytes.get(shard.key, 0)
        granted = shard.size_bytes or max(have, _STEP_BYTES)
        self._reserve(shard, granted)
        child = spawn.start(
            "fetcher", "fetcher", text_fd=-1, ring_fd=-1, lock_fds=[self._lock_fd], now=0.0
        )
        try:
            child.channel.send(FetcherSetup(str(self._folder), self._options))
            child.channel.send(
                Fetch(
                    shard=shard.index,
                    url=shard.url,
                    name=shard.name,
                    key=shard.key,
                    size_bytes=shard.size_bytes,
                    version=shard.version,
                    limit_bytes=granted,
                    sha256=shard.sha256,
                )
            )
            for message in self._messages(child, shard):
                match message:
                    case ReserveMore():
                        granted += _STEP_BYTES
                        self._reserve(shard, granted)
                        child.channel.send(Grant(shard.index, granted))
                    case ShardFetched(file_name=name, size_bytes=size):
                        with self._changed:
                            self._bytes[shard.key] = size
                            self.fetched += 1
                        return self._folder / name
                    case FetchFailed(what=what, remedy=remedy, disk_full=full):
                        raise (DiskError if full else SourceError)(what, remedy)
                    case Failed(what=what, remedy=remedy, exit_code=code):
                        error = FinewebError(what, remedy)
                        error.exit_code = ExitCode(code)
                        raise error
        finally:
            child.kill()
            child.close()
        raise StoppedError("stopped", "nothing is lost")

    def _messages(self, child: spawn.Child, shard: Shard) -> Iterator[Message]:
        """What the fetcher says, until all is called off. Raises: WorkerCrashError: it died."""
        with selectors.DefaultSelector() as selector:
            selector.register(child.channel, selectors.EVENT_READ)
            while not self._stopped:
                if not selector.select(_LOOK_S):
                    continue
                messages, gone = child.channel.receive()
                yield from messages
                if gone:
                    raise WorkerCrashError(
                        f"{shard.name}: its fetcher died by {child.wait()}", "try again"
                    )


def _no_room(shard: Shard, total_bytes: int, budget_bytes: int) -> BudgetError:
    return BudgetError(
        f"{shard.name} is not in the cache any more, and its {total_bytes / 1e9:.3f} GB do not fit "
        f"into the {budget_bytes / 1e9:.3f} GB that the budget leaves for shards",
        "give --max-disk more, or another folder with --cache-dir",
    )
