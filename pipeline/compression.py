"""A shard's bytes as one decompressed stream, whatever it was compressed with.

Runs in: decompressors. Memory is bounded whatever the bytes claim or expand to, and a stream that
is cut off, altered, or followed by anything that is no stream of its kind is an error: each of
the libraries below forgives one of these, and documents would be missing without a word.

    bz2  rapidgzip       gz  gzip       zst  Arrow       several streams in a row are one
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import rapidgzip

CHUNK_BYTES = 1 << 20
# What these streams raise for bytes that are not what they should be.
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, zlib.error)

_BZ2_TRAILER_BITS = 80  # magic and checksum behind the last block
_MAGIC = ((b"BZh", "bz2"), (b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"))
_SUFFIX = {
    "bz2": "bz2", "tbz2": "bz2", "tbz": "bz2", "gz": "gz", "tgz": "gz", "zst": "zst", "zstd": "zst",
}  # fmt: skip


def by_content(start: bytes) -> str | None:
    """The compression that a file's first bytes show, or None."""
    if (
        start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50
    ):  # skippable frame: pzstd begins so
        return "zst"
    return next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)


def by_name(name: str) -> str | None:
    """The compression that a file's name promises, or None."""
    return _SUFFIX.get(name.lower().rsplit(".", 1)[-1])


def open_stream(file: BinaryIO, path: str, kind: str | None) -> BinaryIO:
    """The decompressed bytes of a file.

    Args:
        file: At its beginning; closing the stream may leave it open.
        path: The same file.
        kind: What by_content says of it.
    """
    return _OPEN[kind](file, path)


def _bz2(file: BinaryIO, path: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Bz2(path), CHUNK_BYTES))


def _gz(file: BinaryIO, path: str) -> BinaryIO:
    # rapidgzip is 1.7 times as fast, and takes a stream that is cut off for one that has ended
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _zst(file: BinaryIO, path: str) -> BinaryIO:
    # Arrow's reader refuses a frame that is cut off, which zstandard's takes for the end
    return cast(BinaryIO, pa.CompressedInputStream(pa.OSFile(path), "zstd"))


_OPEN: dict[str | None, Callable[[BinaryIO, str], BinaryIO]] = {
    None: lambda file, path: file,
    "bz2": _bz2,
    "gz": _gz,
    "zst": _zst,
}


class _Bz2(io.RawIOBase):
    """Any number of bz2 streams; bytes behind the last one are an error (rapidgzip, like the
    bzip2 command, prints a warning and ignores them)."""

    def __init__(self, path: str) -> None:
        # one core: the pipeline's parallelism is over shards; 1.3 times the standard library here
        self._stream = rapidgzip.IndexedBzip2File(path, parallelization=1)
        self._size_bytes = Path(path).stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._stream.readinto(buffer))
        if not size and len(buffer):
            last_bit = max(self._stream.block_offsets()) + _BZ2_TRAILER_BITS
            if -(-last_bit // 8) != self._size_bytes:
                raise EOFError("there are other bytes behind the last bz2 stream")
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class Forward(io.RawIOBase):
    """A stream whose first bytes have been read already, and that can be skipped in but never
    gone back in: what a tar reader needs.

    Args:
        start: The bytes read so far.
        stream: The rest of them.
    """

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self._start, self._stream = start, stream
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Skip to an absolute position, or to the end if that comes first.

        Raises:
            OSError: it lies behind, or is not absolute.
        """
        if whence != io.SEEK_SET or offset < self._position:
            raise OSError(f"the stream cannot go from {self._position} to {offset}")
        while self._position < offset:
            if not self.read(min(CHUNK_BYTES, offset - self._position)):
                break
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._start:
            size = min(len(buffer), len(self._start))
            buffer[:size], self._start = self._start[:size], self._start[size:]
        else:
            size = int(self._stream.readinto(buffer))  # type: ignore[attr-defined]
        self._position += size
        return size
