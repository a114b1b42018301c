"""Patterns into files: braces, globs, folders and lists of patterns, wherever the shards lie.

Runs in: supervisor.

    s3://bucket/fineweb/shard-{00000..01000}.tar.bz2     braces, as in WebDataset; anywhere
    hf://datasets/OWNER/NAME/sample/10BT/*.parquet       globs: hf, s3, gs, az and this disk
    gs://bucket/fineweb/                                 a folder: what lies directly in it
    @patterns.txt                                        a file with one pattern a line; # comments
"""

from __future__ import annotations

import glob
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from webdataset.shardlists import expand_urls

from pipeline import store_source
from pipeline.errors import ConfigError
from pipeline.globs import Glob, may_be_shard
from pipeline.redaction import hide, redact
from pipeline.sources import Listed, Patience, Stat, TransientError, scheme_of

T = TypeVar("T")
_AGAIN_S = 5.0  # between words on attempts that are made again


class Watch:
    """Is told how looking for shards goes, by any thread, and passes on what is not too much.

    Args:
        progress: Called with (done, total), after shards that had to be asked for.
        tried_again: Called with what went wrong, without secrets, and the seconds that are waited.
        every_s: Between two calls of progress.
    """

    def __init__(
        self,
        progress: Callable[[int, int], object] = lambda done, total: None,
        tried_again: Callable[[str, float], object] = lambda why, wait_s: None,
        every_s: float = 0.0,
    ) -> None:
        self._progress, self._tried_again, self._every_s = progress, tried_again, every_s
        self._lock = threading.Lock()
        self._said_progress, self._said_again = time.monotonic(), -_AGAIN_S

    def progress(self, done: int, total: int) -> None:
        """So many of so many shards are known."""
        with self._lock:
            if time.monotonic() - self._said_progress >= self._every_s:
                self._said_progress = time.monotonic()
                self._progress(done, total)

    def tried_again(self, why: str, wait_s: float) -> None:
        """Something went wrong, and is tried again after a wait."""
        with self._lock:
            if time.monotonic() - self._said_again >= _AGAIN_S:
                self._said_again = time.monotonic()
                self._tried_again(why, wait_s)


QUIET = Watch()


class Found(NamedTuple):
    """A file that a pattern has found."""

    url: str  # may carry secrets
    pattern: str  # without secrets
    stat: Stat | None = None  # None: nobody has said it yet
    sha256: str | None = None


def find(patterns: Sequence[str], options: dict[str, Any], watch: Watch = QUIET) -> list[Found]:
    """The files of all patterns, in the order given; those of one are in the order of their names.

    Args:
        patterns: See the module; without @files.
        options: For pipeline.sources, and max_retries.
        watch: Is told of attempts that are made again.

    Raises:
        ConfigError: a pattern matches nothing or is none, or a shard is named twice.
        SourceError: a listing cannot be had; says which and why.
    """
    return each_once(file for files in find_each(patterns, options, watch) for file in files)


def find_each(
    patterns: Sequence[str], options: dict[str, Any], watch: Watch = QUIET
) -> Iterator[list[Found]]:
    """The files of each pattern. See find."""
    expanded = {pattern: list(expand_urls(pattern)) for pattern in patterns}
    hide(one for some in expanded.values() for one in some)
    of_hub = [one for some in expanded.values() for one in some if scheme_of(one) == "hf"]
    on_hub = _on_hub(of_hub, options, watch) if of_hub else {}
    for pattern in patterns:
        found: list[Found] = []
        for one in expanded[pattern]:
            listed = on_hub[one] if one in on_hub else _files(one, pattern, options, watch)
            if not listed:
                raise ConfigError(f"--shards {shown(pattern)}: nothing matches", _remedy(one))
            found += [
                Found(file.url, shown(pattern), file.stat, file.sha256)
                if isinstance(file, Listed)
                else Found(file, shown(pattern))
                for file in listed
            ]
        yield found


def each_once(found: Iterable[Found]) -> list[Found]:
    """The same files. Raises: ConfigError, if one is named twice."""
    by_url: dict[str, Found] = {}
    for file in found:
        if by_url.setdefault(file.url, file) is not file:
            raise ConfigError(f"{redact(file.url)} is named twice", "name every shard once")
    return list(by_url.values())


def shown(pattern: str) -> str:
    """The pattern without secrets; a ? begins a query, which may hold them, on the web alone."""
    if scheme_of(pattern) in ("http", "https"):
        return redact(pattern)
    return redact(pattern.replace("?", "\0")).replace("\0", "?")


def read_lists(patterns: Sequence[str]) -> list[str]:
    """The patterns, with those of @files in their place.

    Raises:
        ConfigError: there is none, or a file cannot be read.
    """
    read: list[str] = []
    for pattern in patterns:
        if not pattern.startswith("@"):
            read.append(pattern)
            continue
        try:
            lines = Path(pattern[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ConfigError(f"--shards {pattern}: {why}", "check the list's path") from None
        wanted = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
        if any(line.startswith("@") for line in wanted):
            raise ConfigError(f"--shards {pattern} names another list", "give both with --shards")
        read += wanted
    if not read:
        raise ConfigError("no shards are given", "name them with --shards or data.stream.shards")
    hide(read)
    return read


def patiently(
    what: Callable[[], T],
    options: dict[str, Any],
    watch: Watch,
    wait: Callable[[float], Any] = time.sleep,
) -> T:
    """Try until it works, with bounded patience.

    Args:
        what: Is tried.
        options: max_retries.
        watch: Is told of every attempt that is made again.
        wait: Called with the seconds to wait; may end it by raising.
    """
    patience = Patience(int(options["max_retries"]))
    while True:
        try:
            return what()
        except TransientError as error:
            pause_s = patience.pause_s(error)
            watch.tried_again(str(error), pause_s)
            wait(pause_s)


# ── one pattern without braces ──────────────────────────────────────────────────────────────


def _files(one: str, pattern: str, options: dict[str, Any], watch: Watch) -> Sequence[str | Listed]:
    """Its files: addresses, and what is known of each if they were listed."""
    scheme = scheme_of(one)
    if scheme in ("", "file"):
        return _local(urllib.parse.unquote(urllib.parse.urlsplit(one).path) if scheme else one,
                      pattern)  # fmt: skip
    if scheme in store_source.SCHEMES:
        return _in_store(one, options, watch)
    try:
        parts = urllib.parse.urlsplit(one)
        known = parts.port != 0
    except ValueError as error:
        raise ConfigError(f"{one!r} is no address: {error}", "check the pattern") from None
    if not known:
        raise ConfigError(f"{redact(one)!r} is no address", "check the pattern")
    if "*" in parts.path and scheme in ("http", "https"):
        raise ConfigError(
            f"--shards {shown(pattern)}: a web server does not list its files",
            "name them with braces, {00000..00999}, or in a file with @FILE",
        )
    return [one]


def _in_store(one: str, options: dict[str, Any], watch: Watch) -> Sequence[str | Listed]:
    """The objects of a glob or folder, listed; the address itself if it is neither."""
    scheme, bucket, key = store_source.split(one)
    if not bucket:
        raise ConfigError(f"--shards {one}: it names no bucket", f"give {scheme}://BUCKET/…")
    if key and not Glob.is_in(key) and not key.endswith("/"):
        return [one]
    wanted = Glob(key) if Glob.is_in(key) else Glob.of_folder(key)
    folder = f"{scheme}://{bucket}/{wanted.folder}{'/' if wanted.folder else ''}"
    timeout_s = float(options["timeout_s"])

    def matching() -> list[Listed]:
        listed = store_source.list_objects(folder, timeout_s)
        return [file for file in listed if wanted.matches(store_source.split(file.url)[2])]

    return sorted(patiently(matching, options, watch), key=lambda file: file.url)


def _on_hub(urls: list[str], options: dict[str, Any], watch: Watch) -> dict[str, list[Listed]]:
    from pipeline import hub_listing

    timeout_s = float(options["timeout_s"])
    return patiently(lambda: hub_listing.find(urls, timeout_s), options, watch)


def _local(path: str, pattern: str) -> list[str]:
    """File URLs of one local path, glob or folder."""
    found = Path(path)
    if found.is_dir():
        paths = sorted(p for p in found.iterdir() if p.is_file() and may_be_shard(p.name))
    elif found.exists():
        paths = [found]
    else:
        some = glob.iglob(path, recursive=True)  # noqa: PTH207 - the path may be absolute
        paths = sorted(one for one in map(Path, some) if one.is_file())
    if not paths:
        raise ConfigError(
            f"--shards {pattern}: nothing is at {found.absolute()}",
            "check the path; quote patterns, so that the shell leaves them alone",
        )
    return [p.absolute().as_uri() for p in paths]


def _remedy(one: str) -> str:
    """What may be wrong with a pattern that matches nothing."""
    folder = "it is matched part by part: * matches no slash, ** does"
    return folder if Glob.is_in(one) else "check the folder's name"
