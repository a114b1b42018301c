"""Patterns into shards: addresses, sizes and versions, in a fixed order.

Runs in: supervisor.
"""

from __future__ import annotations

import glob
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from webdataset.shardlists import expand_urls

from pipeline.errors import ConfigError
from pipeline.redaction import hide, redact
from pipeline.sources import Patience, Stat, TransientError, local_path, open_source

__all__ = ["Shard", "build", "expand", "local_path"]


class Shard(msgspec.Struct, frozen=True):
    """One remote or local file of documents."""

    index: int  # in catalog order
    url: str  # may carry secrets: never logged, never stored
    name: str  # the same without them
    size_bytes: int | None  # None: the server does not say
    version: str  # ETag or modification time

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name this version of this file in the cache."""
        said = f"{self.name}\n{self.version}\n{self.size_bytes}"
        return xxhash.xxh3_64_hexdigest(said.encode())


def expand(patterns: Sequence[str]) -> list[str]:
    """URLs of all patterns in the order given; local paths become file URLs.

    Args:
        patterns: URLs or paths with {000..123} or {a,b} braces; local globs; local folders.

    Raises:
        ConfigError: a pattern matches nothing, or a shard is named twice.
    """
    if not patterns:
        raise ConfigError("no shards are given", "name them with --shards or data.stream.shards")
    hide(patterns)
    urls: list[str] = []
    for pattern in patterns:
        for one in expand_urls(pattern):
            urls += [one] if _is_url(one) else _local(one, pattern)
    hide(urls)
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError(f"{redact(url)} is named twice", "name every shard once")
        seen.add(url)
    return urls


def _is_url(text: str) -> bool:
    """Whether it has a scheme. Raises: ConfigError."""
    try:
        parts = urllib.parse.urlsplit(text)
        return bool(parts.scheme) and parts.port != 0
    except ValueError as error:
        raise ConfigError(f"{text!r} is no address: {error}", "check the pattern") from None


def _local(path: str, pattern: str) -> list[str]:
    """File URLs of one local path, glob or folder."""
    found = Path(path)
    if found.is_dir():
        paths = sorted(p for p in found.iterdir() if p.is_file() and not p.name.startswith("."))
    elif found.exists():
        paths = [found]
    else:
        paths = sorted(Path(one) for one in glob.glob(path))  # noqa: PTH207 - the path may be absolute
    if not paths:
        raise ConfigError(
            f"--shards {pattern}: nothing is at {found.absolute()}",
            "check the path; quote patterns, so that the shell leaves them alone",
        )
    return [p.absolute().as_uri() for p in paths]


def build(
    patterns: Sequence[str],
    options: dict[str, Any],
    concurrency: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Shard, ...]:
    """The catalog: every shard with its size and version.

    Args:
        patterns: See expand.
        options: For pipeline.sources, and max_retries.
        concurrency: Shards that are asked for at the same time.
        progress: Called with (done, total) now and then.

    Raises:
        ConfigError: see expand.
        SourceError: a shard cannot be had; says which and why.
    """
    urls = expand(patterns)
    stopped = threading.Event()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            shards = []
            stats = pool.map(lambda url: _stat(url, options, stopped), urls)
            for index, (url, name, stat) in enumerate(zip(urls, _names(urls), stats, strict=True)):
                shards.append(Shard(index, url, name, stat.size_bytes, stat.version))
                progress(index + 1, len(urls))
        except BaseException:  # one shard's patience is enough: the others need not lose theirs
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(shards)


def _names(urls: Sequence[str]) -> Iterator[str]:
    """What may be shown of each URL; those that differ in their secrets alone are numbered, or
    they would share a file in the cache."""
    seen: Counter[str] = Counter()
    for url in urls:
        name = redact(url)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _stat(url: str, options: dict[str, Any], stopped: threading.Event) -> Stat:
    """Ask for one shard, with bounded patience."""
    patience = Patience(int(options["max_retries"]))
    while True:
        try:
            return open_source(url, options).stat()
        except TransientError as error:
            stopped.wait(patience.pause_s(error))
            if stopped.is_set():
                raise
