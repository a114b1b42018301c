"""Where shards come from, behind one small interface: the web, the hub, stores and this disk.

Runs in: supervisor (stat, list) and fetchers (read).

Errors are of three kinds: TransientError (try again, later if the server says so), ChangedError
(the remote file is another one now) and SourceError (trying again does not help). None of them,
nor any log line, holds the secret parts of a URL.
"""

from __future__ import annotations

import os
import random
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.errors import SourceError
from pipeline.redaction import redact

CHUNK_BYTES = 1 << 20
_FIRST_WAIT_S = 0.2
_MAX_WAIT_S = 60.0
_MAX_ASKED_S = (
    300.0  # the hub counts requests over five minutes, and says how many are left of them
)


class TransientError(Exception):
    """Worth another attempt.

    Args:
        what: What happened, with nothing secret.
        retry_after_s: The server's own word on when, if it gave one.
        remedy: What to do if further attempts fail as well.
    """

    def __init__(
        self,
        what: str,
        retry_after_s: float | None = None,
        remedy: str = "check the network and the server; the same command resumes",
    ) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s
        self.remedy = remedy


class ChangedError(Exception):
    """The remote file is not the version that was asked for.

    Args:
        what: How that is known, with nothing secret.
        remedy: What to do if it stays so.
    """

    def __init__(
        self,
        what: str,
        remedy: str = "start over with --fresh, when nobody writes to it any more",
    ) -> None:
        super().__init__(what)
        self.remedy = remedy


class Patience:
    """How often something is tried again, and how long to wait in between.

    Args:
        max_retries: Attempts after the first one, each without progress.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self.progress()

    def progress(self) -> None:
        """Something was achieved: the next failure is a first one again."""
        self.failures, self._wait_s = 0, _FIRST_WAIT_S

    def pause_s(self, error: TransientError) -> float:
        """Seconds to wait after this failure: what the server asks for, at most five minutes, or
        twice as long as before, at most one.

        Raises:
            SourceError: it has failed too often.
        """
        self.failures += 1
        if self.failures > self._max_retries:
            what = f"{error} ({self.failures} attempts without progress)"
            raise SourceError(what, error.remedy) from None
        if error.retry_after_s is not None:
            return min(error.retry_after_s, _MAX_ASKED_S)
        pause = self._wait_s * random.uniform(0.5, 1)
        self._wait_s *= 2
        return min(pause, _MAX_WAIT_S)


class Stat(NamedTuple):
    """What a source says of a file before it is read."""

    size_bytes: int | None
    version: str  # ETag, or modification time; '' if there is neither


class Listed(NamedTuple):
    """A file that a listing names, with what it says of it."""

    url: str
    stat: Stat
    sha256: str | None = None


class Chunks(NamedTuple):
    """A body that is being read: it begins at start, which is 0 where ranges are not served.
    Pieces come as they arrive, so that what was received before a failure is not lost."""

    start: int
    data: Iterator[bytes]


class Source(Protocol):
    """One remote file."""

    def stat(self) -> Stat:
        """Size and version. Raises: TransientError, SourceError."""
        ...

    def read(self, start: int, expected: Stat, end: int | None = None) -> Chunks:
        """The body from byte start on, up to end where ranges are served. Raises, also while it is
        read: TransientError, ChangedError (it is not as expected), SourceError."""
        ...


def open_source(url: str, options: dict[str, Any]) -> Source:
    """The source of a URL. What it takes is imported only when it is used.

    Args:
        url: http, https, hf, s3, gs, az or file.
        options: timeout_s, seconds of silence after which a connection is given up.

    Raises:
        SourceError: there is no such kind of source.
    """
    scheme = scheme_of(url)
    timeout_s = float(options["timeout_s"])
    match scheme:
        case "http" | "https":
            from pipeline.http_source import HttpSource

            return HttpSource(url, timeout_s)
        case "hf":
            from pipeline.hub_source import HubSource

            return HubSource(url, timeout_s)
        case "s3" | "gs" | "az":
            from pipeline.store_source import StoreSource

            return StoreSource(url, timeout_s)
        case "file":
            return _LocalFile(url)
    raise SourceError(
        f"{redact(url)}: shards cannot come from {scheme or 'this kind of address'!r}",
        "give http://, https://, hf://, s3://, gs://, az:// or a path",
    )


def scheme_of(url: str) -> str:
    """What stands before ://, or '' for a path."""
    before, sign, _ = url.partition("://")
    return before.lower() if sign and before.isalnum() else ""


def certificates() -> Path | None:
    """The file of authorities that the environment names, for every kind of source.

    Raises:
        SourceError: it is not there.
    """
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if given := os.environ.get(name):
            if not Path(given).is_file():
                raise SourceError(f"{name}: there is no file {given}", "correct the variable")
            return Path(given)
    return None


# ── this disk ───────────────────────────────────────────────────────────────────────────────


class _LocalFile:
    """A file of this machine. It is read in place; nothing is fetched."""

    def __init__(self, url: str) -> None:
        self._path = Path(local_path(url) or "")

    def stat(self) -> Stat:
        try:
            found = self._path.stat()
        except OSError as error:
            raise SourceError(
                f"{self._path}: {error.strerror}", "check the path of the shard"
            ) from error
        return Stat(found.st_size, f"mtime {found.st_mtime_ns}")

    def read(self, start: int, expected: Stat, end: int | None = None) -> Chunks:
        """See Source; end is none of a file that is read in place."""
        file = self._path.open("rb")
        file.seek(start)
        return Chunks(start, iter(lambda: file.read(CHUNK_BYTES), b""))


def local_path(url: str) -> str | None:
    """The path of a file URL, or None."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.unquote(parts.path) if parts.scheme == "file" else None
