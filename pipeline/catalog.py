"""Shards in a fixed order, with sizes, versions and digests: from patterns, and from manifests.

Runs in: supervisor.

What has been found out once is kept beside the run, so that the next start asks for nothing; a
shard that has changed since is found out when it is fetched.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from pipeline import listing, manifest
from pipeline.errors import ConfigError, SourceError
from pipeline.listing import QUIET, Found, Watch
from pipeline.manifest import Entry, Manifest
from pipeline.redaction import redact
from pipeline.sources import Stat, TransientError, local_path, open_source, scheme_of

__all__ = ["Shard", "build", "local_path", "names", "to_entries"]

FILE_NAME = "shards.jsonl"  # the catalog that a run keeps: a manifest
_LISTED = ("hf", "s3", "gs", "az")  # their addresses hold no secrets
_CONCURRENCY = 16
_AHEAD = 256  # requests that wait for a thread: memory is bounded however many shards there are


class Shard(msgspec.Struct, frozen=True):
    """One remote or local file of documents."""

    index: int  # in catalog order
    url: str  # may carry secrets: never logged, never stored
    name: str  # the same without them
    size_bytes: int | None  # None: the server does not say
    version: str  # ETag or modification time
    sha256: str | None = None  # what its bytes must have, if that is known
    pattern: str = ""  # what it was found by, without secrets

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name this version of this file in the cache."""
        said = f"{self.name}\n{self.version}\n{self.size_bytes}"
        if self.sha256 is not None:  # a file that was fetched without it has yet to be checked
            said += f"\n{self.sha256}"
        return xxhash.xxh3_64_hexdigest(said.encode())


class Known(NamedTuple):
    """What need not be asked for.

    given: the user's manifest; every shard must stand in it. kept: an earlier start's catalog.
    ask: ask all the same, to compare.
    """

    given: Manifest | None = None
    kept: Manifest | None = None
    ask: bool = False


NOTHING = Known()


def build(
    patterns: Sequence[str],
    options: dict[str, Any],
    known: Known = NOTHING,
    watch: Watch = QUIET,
) -> tuple[Shard, ...]:
    """The catalog: every shard with its size and version.

    Args:
        patterns: See pipeline/listing.py; without any, the shards of the given manifest.
        options: For pipeline.sources, and max_retries.
        known: Manifests.
        watch: Is told how it goes.

    Raises:
        ConfigError: a pattern or manifest that cannot be.
        SourceError: a shard cannot be had, or is not what the manifest says; says which and why.
    """
    if not patterns and known.given is not None:
        patterns = _of_manifest(known.given)
    found = _found(listing.read_lists(patterns), options, known.kept, watch)
    named = list(zip(found, _names(found), strict=True))
    stats = _stats([_without_asking(one, name, known) for one, name in named], options, watch)
    return tuple(
        _shard(index, one, name, stat, known.given)
        for index, ((one, name), stat) in enumerate(zip(named, stats, strict=True))
    )


def names(patterns: Sequence[str], options: dict[str, Any]) -> list[str]:
    """What the shards of the patterns are called. Raises: see build."""
    return list(_names(listing.find(listing.read_lists(patterns), options)))


def to_entries(shards: Iterable[Shard], *, with_local: bool = False) -> list[Entry]:
    """What a manifest says of shards, and nothing secret; those of this disk are left out, since
    they are looked at anyway."""
    return [
        Entry(
            name=shard.name,
            size_bytes=shard.size_bytes,
            version=shard.version,
            sha256=shard.sha256,
            url=shard.url if shard.url != shard.name and scheme_of(shard.url) in _LISTED else "",
            pattern=shard.pattern,
        )
        for shard in shards
        if with_local or scheme_of(shard.url) != "file"
    ]


# ── what patterns find ──────────────────────────────────────────────────────────────────────


def _of_manifest(given: Manifest) -> list[str]:
    """The addresses of a manifest's shards: whole ones, or relative to its file."""
    folder = Path(given.source).absolute().parent
    return [
        entry.url or (entry.name if scheme_of(entry.name) else str(folder / entry.name))
        for entry in given.entries.values()
    ]


def _found(
    patterns: Sequence[str], options: dict[str, Any], kept: Manifest | None, watch: Watch
) -> list[Found]:
    """The files of all patterns; listings that an earlier start has kept are not made again."""
    kept_by_pattern: dict[str, list[Found]] = defaultdict(list)
    for entry in kept.entries.values() if kept else ():
        stat = Stat(entry.size_bytes, entry.version)
        found = Found(entry.url or entry.name, entry.pattern, stat, entry.sha256)
        kept_by_pattern[entry.pattern].append(found)
    new = [
        pattern
        for pattern in patterns
        if scheme_of(pattern) not in _LISTED or listing.shown(pattern) not in kept_by_pattern
    ]
    files = dict(zip(new, listing.find_each(new, options, watch), strict=True))
    return listing.each_once(
        file
        for pattern in patterns
        for file in files.get(pattern) or kept_by_pattern[listing.shown(pattern)]
    )


def _names(found: Sequence[Found]) -> Iterator[str]:
    """What may be shown of each file; those that differ in their secrets alone are numbered, or
    they would share a file in the cache."""
    seen: Counter[str] = Counter()
    for one in found:
        name = _name(one.url)
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})"


def _name(url: str) -> str:
    """A shard of the hub is the same in every revision that has the same bytes."""
    if scheme_of(url) == "hf":
        from pipeline.hub_source import place

        return place(url).name
    return redact(url)


# ── sizes and versions ──────────────────────────────────────────────────────────────────────


def _without_asking(found: Found, name: str, known: Known) -> Found:
    """With what is known of its size and version; a file of this disk is always looked at."""
    if found.stat is not None or scheme_of(found.url) == "file" or known.ask:
        return found
    entries = [one and one.find(name) for one in (known.kept, known.given)]
    entry = next((one for one in entries if one and one.size_bytes and one.version), None)
    return found if entry is None else found._replace(stat=Stat(entry.size_bytes, entry.version))


def _stats(found: Sequence[Found], options: dict[str, Any], watch: Watch) -> Iterator[Stat]:
    """Size and version of each, in order, asked for where they are not known."""
    stopped = threading.Event()
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        pending: deque[Future[Stat] | Stat] = deque()
        try:
            for index, one in enumerate(found):
                pending.append(one.stat or pool.submit(_stat, one.url, options, stopped, watch))
                if len(pending) > _AHEAD:
                    yield _result(pending.popleft())
                    watch.progress(index + 1 - len(pending), len(found))
            while pending:
                yield _result(pending.popleft())
                watch.progress(len(found) - len(pending), len(found))
        except BaseException:  # one shard's patience is enough: the others need not lose theirs
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(pending: Future[Stat] | Stat) -> Stat:
    return pending if isinstance(pending, Stat) else pending.result()


def _stat(url: str, options: dict[str, Any], stopped: threading.Event, watch: Watch) -> Stat:
    """Ask for one shard, with bounded patience."""

    def wait(pause_s: float) -> None:
        if stopped.wait(pause_s):
            raise TransientError(f"{redact(url)}: another shard was given up")

    return listing.patiently(lambda: open_source(url, options).stat(), options, watch, wait)


def _shard(index: int, found: Found, name: str, stat: Stat, given: Manifest | None) -> Shard:
    """One shard, if it is what the user's manifest says."""
    sha256 = found.sha256
    if given is not None:
        entry = given.find(name)
        if entry is None:
            raise ConfigError(
                f"{name} does not stand in the manifest {given.source}",
                "name the shards of the manifest alone, or make it anew",
            )
        if None not in (entry.size_bytes, stat.size_bytes) and entry.size_bytes != stat.size_bytes:
            raise SourceError(
                f"{name} has {stat.size_bytes} bytes, and {entry.size_bytes} in the manifest "
                f"{given.source}",
                "one of the two is wrong: make the shard or the manifest again",
            )
        if entry.version and stat.version and entry.version != stat.version:
            raise SourceError(
                f"{name} is another version than in the manifest {given.source}",
                "make the manifest again, or leave versions out of it",
            )
        sha256 = entry.sha256 or sha256
    return Shard(index, found.url, name, stat.size_bytes, stat.version, sha256, found.pattern)


def deal(shards: Sequence[Shard], group_bytes: int) -> list[tuple[Shard, ...]]:
    """Consecutive shards in groups: one after the other until a group has so many bytes. Pure.
    One of unknown size fills a group alone."""
    dealt: list[list[Shard]] = []
    room = 0
    for shard in shards:
        if room <= 0:
            dealt.append([])
            room = group_bytes
        dealt[-1].append(shard)
        room -= group_bytes if shard.size_bytes is None else shard.size_bytes
    return [tuple(ones) for ones in dealt]


def size_bytes(folder: Path, shards: Sequence[Shard]) -> tuple[int, int]:
    """Bytes of what keep leaves, and the most that stands on the disk while it is written."""
    path, new = folder / FILE_NAME, len(manifest.encode(to_entries(shards)))
    old = path.stat().st_size if path.exists() else 0
    return new, new + old


def keep(folder: Path, shards: Sequence[Shard]) -> None:
    """Keep the catalog of remote shards in a run's folder for its next start."""
    path, entries = folder / FILE_NAME, to_entries(shards)
    if path.exists() and path.read_bytes() == manifest.encode(entries):
        return
    if entries:
        manifest.write(path, entries)
    else:
        path.unlink(missing_ok=True)


def read_kept(folder: Path) -> Manifest | None:
    """The catalog that an earlier start has kept in a run's folder; None if it is not whole."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        return manifest.read(path)
    except ConfigError:
        return None
