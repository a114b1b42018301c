"""Patterns into shards: addresses, sizes and versions, in a fixed order.

Runs in: supervisor.
"""

from __future__ import annotations

import glob
import random
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from webdataset.shardlists import expand_urls

from pipeline.errors import ConfigError, SourceError
from pipeline.sources import Stat, TransientError, local_path, open_source, redact

__all__ = ["Shard", "build", "expand", "local_path"]

_MAX_WAIT_S = 30.0


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
    urls: list[str] = []
    for pattern in patterns:
        for one in expand_urls(pattern):
            urls += [one] if urllib.parse.urlsplit(one).scheme else _local(one, pattern)
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError(f"{redact(url)} is named twice", "name every shard once")
        seen.add(url)
    return urls


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
    with ThreadPoolExecutor(concurrency) as pool:
        shards = []
        stats = pool.map(lambda url: _stat(url, options), urls)
        for index, (url, stat) in enumerate(zip(urls, stats, strict=True)):
            shards.append(Shard(index, url, redact(url), stat.size_bytes, stat.version))
            progress(index + 1, len(urls))
    return tuple(shards)


def _stat(url: str, options: dict[str, Any]) -> Stat:
    """Ask for one shard, with bounded patience."""
    attempts = int(options["max_retries"])
    for attempt in range(attempts + 1):
        try:
            return open_source(url, options).stat()
        except TransientError as error:
            if attempt == attempts:
                raise SourceError(
                    f"{error} ({attempts + 1} attempts)", "check the network and the address"
                ) from None
            wait = error.retry_after_s or 0.2 * 2**attempt * random.uniform(0.5, 1)
            time.sleep(min(wait, _MAX_WAIT_S))
    raise AssertionError
