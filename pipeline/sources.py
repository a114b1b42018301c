"""Where shards come from: http(s), s3 and this disk, behind one small interface.

Runs in: supervisor (stat) and fetchers (read).

Errors are of three kinds: TransientError (try again, later if the server says so), ChangedError
(the remote file is another one now) and SourceError (trying again does not help). None of them,
nor any log line, holds the secret parts of a URL.
"""

from __future__ import annotations

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
    """The remote file is not the version that was asked for."""


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
        """Seconds to wait after this failure: what the server asks for or twice as long as
        before, at most a minute.

        Raises:
            SourceError: it has failed too often.
        """
        self.failures += 1
        if self.failures > self._max_retries:
            what = f"{error} ({self.failures} attempts without progress)"
            raise SourceError(what, error.remedy) from None
        pause = error.retry_after_s
        if pause is None:
            pause = self._wait_s * random.uniform(0.5, 1)
            self._wait_s *= 2
        return min(pause, _MAX_WAIT_S)


class Stat(NamedTuple):
    """What a source says of a file before it is read."""

    size_bytes: int | None
    version: str  # ETag, or modification time; '' if there is neither


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

    def read(self, start: int, expected: Stat) -> Chunks:
        """The body from byte start on. Raises, also while it is read: TransientError,
        ChangedError (it is not as expected), SourceError."""
        ...


def open_source(url: str, options: dict[str, Any]) -> Source:
    """The source of a URL.

    Args:
        url: http, https, s3 or file.
        options: timeout_s, seconds of silence after which a connection is given up.

    Raises:
        SourceError: there is no such kind of source.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    timeout_s = float(options["timeout_s"])
    match scheme:
        case "http" | "https":
            from pipeline.http_source import HttpSource

            return HttpSource(url, timeout_s)
        case "s3":
            from pipeline.s3_source import S3Source

            return S3Source(url, timeout_s)
        case "file":
            return _LocalFile(url)
    raise SourceError(
        f"{redact(url)}: shards cannot come from {scheme or 'this kind of address'!r}",
        "give http://, https://, s3:// or a path",
    )


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

    def read(self, start: int, expected: Stat) -> Chunks:
        file = self._path.open("rb")
        file.seek(start)
        return Chunks(start, iter(lambda: file.read(CHUNK_BYTES), b""))


def local_path(url: str) -> str | None:
    """The path of a file URL, or None."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.unquote(parts.path) if parts.scheme == "file" else None
