"""A remote shard as a file that is read without ever standing on a disk.

Runs in: decompressors, with --max-disk 0. Read forward it is one request. A connection that
breaks is opened again where it broke, by range and with the version check; where the server has
no ranges, what was read before is read again and passed over.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from pipeline.errors import SourceError
from pipeline.messages import Remote
from pipeline.sources import ChangedError, Patience, Stat, TransientError, open_source

_BUFFER_BYTES = 1 << 20
_READ_THROUGH_BYTES = 1 << 20  # a gap this small is read, not asked over: a request takes longer
_MAX_CHANGES = 3  # one of several servers behind an address may lag
_SIGN_OF_LIFE_S = 1.0


def open_remote(
    remote: Remote, name: str, options: dict[str, Any], working: Callable[[], None]
) -> BinaryIO:
    """The shard as a seekable file, from its start.

    Args:
        remote: Where it lies, and what it must be.
        name: For messages.
        options: For pipeline.sources, and max_retries.
        working: Called now and then while the network is waited for.
    """
    raw = _RemoteFile(remote, name, options, working)
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))


class _RemoteFile(io.RawIOBase):
    """See open_remote. Its reads raise SourceError, which trying again does not cure."""

    def __init__(
        self, remote: Remote, name: str, options: dict[str, Any], working: Callable[[], None]
    ) -> None:
        self._name, self._working = name, working
        self._expected = Stat(remote.size_bytes, remote.version)
        self._source = open_source(remote.url, options)
        self._patience = Patience(int(options["max_retries"]))
        self._changes = 0
        self._wanted = 0  # where the reader is
        self._at = 0  # where the connection is, behind the rest
        self._rest = memoryview(b"")
        self._pieces: Iterator[bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._wanted

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is asked for before the next read.

        Raises:
            OSError: from an end that is not known.
        """
        if whence == io.SEEK_CUR:
            offset += self._wanted
        elif whence == io.SEEK_END:
            if self._expected.size_bytes is None:
                raise OSError(
                    f"{self._name}: its server does not say how long it is, which this form needs "
                    "to be known with --max-disk 0"
                )
            offset += self._expected.size_bytes
        self._wanted = max(0, offset)
        return self._wanted

    def readinto(self, buffer: Any) -> int:
        if self._expected.size_bytes is not None and self._wanted >= self._expected.size_bytes:
            return 0
        while not self._rest or self._wanted != self._at - len(self._rest):
            try:
                if not self._advance():
                    return 0
            except ChangedError as error:
                self._hang_up()
                self._changes += 1
                if self._changes >= _MAX_CHANGES:
                    what = f"{error}: it is not what was found when the run began"
                    raise SourceError(what, error.remedy) from None
            except TransientError as error:
                self._hang_up()
                self._wait(self._patience.pause_s(error))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        self._wanted += size
        return size

    def _advance(self) -> bool:
        """One piece nearer to what is wanted; False at the end of the shard."""
        gap = self._wanted - (self._at - len(self._rest))
        if self._pieces is None or gap < 0 or gap > len(self._rest) + _READ_THROUGH_BYTES:
            self._hang_up()
            chunks = self._source.read(self._wanted, self._expected)
            self._at, self._pieces = chunks.start, chunks.data
        elif gap and self._rest:
            self._rest = self._rest[gap:]
            return True
        piece = next(self._pieces, b"")
        self._at += len(piece)
        self._working()
        size = self._expected.size_bytes
        if size is not None and self._at > size:
            raise ChangedError(f"{self._name} is longer than {size} bytes")
        if piece:
            self._patience.progress()
            behind = max(0, self._wanted - (self._at - len(piece)))
            self._rest = memoryview(piece)[behind:]
            return True
        if size is not None and self._at < size:
            raise TransientError(f"{self._name}: its body ended after {self._at} bytes")
        return False

    def _wait(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while (left := until - time.monotonic()) > 0:
            self._working()
            time.sleep(min(left, _SIGN_OF_LIFE_S))

    def _hang_up(self) -> None:
        if self._pieces is not None and hasattr(self._pieces, "close"):
            self._pieces.close()
        self._pieces, self._rest = None, memoryview(b"")

    def close(self) -> None:
        self._hang_up()
        super().close()
