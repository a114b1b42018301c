"""A shard's bytes as one decompressed stream, whatever it was compressed with.

Runs in: decompressors. Memory is bounded whatever the bytes claim or expand to, and a stream that
is cut off, altered, or followed by anything that is no stream of its kind is an error: each of
the libraries below forgives one of these, and documents would be missing without a word.

    bz2  rapidgzip       gz  gzip       xz  lzma       zst, lz4  Arrow

Several streams in a row are one. Reading can begin in the middle: at once in a plain file and in
bz2, and elsewhere by decompressing what comes before.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import rapidgzip

from pipeline import bz2_entry
from pipeline.messages import Entry

CHUNK_BYTES = 1 << 20
# What these streams raise for bytes that are not what they should be.
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError)

_XZ_MEMORY_BYTES = 1 << 28  # a dictionary may need so much; xz -9 takes a quarter of it
_MAGIC = (
    (b"BZh", "bz2"), (b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\xfd7zXZ\0", "xz"), (b"\x04\x22\x4d\x18", "lz4"),
)  # fmt: skip
_SUFFIX = {
    "bz2": "bz2", "tbz2": "bz2", "tbz": "bz2", "gz": "gz", "tgz": "gz", "zst": "zst", "zstd": "zst",
    "tzst": "zst", "xz": "xz", "txz": "xz", "lz4": "lz4",
}  # fmt: skip
_OPEN: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "bz2": lambda file: _in_a_row(file, bz2.BZ2Decompressor),
    # rapidgzip is 1.7 times as fast, and takes a stream that is cut off for one that has ended
    "gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    "xz": lambda file: _in_a_row(file, _Xz, padding=b"\0"),
    # Arrow's reader refuses a frame that is cut off, which zstandard's takes for the end
    "zst": lambda file: cast(BinaryIO, pa.CompressedInputStream(file, "zstd")),
    "lz4": lambda file: cast(BinaryIO, pa.CompressedInputStream(file, "lz4")),
}
KINDS = tuple(_OPEN)


class Opened(NamedTuple):
    """A stream of decompressed bytes.

    position: of its first byte, in all the decompressed bytes. bz2_at: of a byte that was read
    already, what Entry.bz2 says.
    """

    stream: BinaryIO
    position: int
    bz2_at: Callable[[int], tuple[int, int, int] | None]


def by_content(start: bytes, promised: str | None = None) -> str | None:
    """The compression that a file's first bytes show, or None.

    Args:
        start: Eight bytes or more.
        promised: By the name: zstd and lz4 have a frame in common that is skipped.
    """
    if start[1:4] == b"\x2a\x4d\x18" and start[0] & 0xF0 == 0x50:  # pzstd begins so
        return "lz4" if promised == "lz4" else "zst"
    return next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)


def by_name(name: str) -> str | None:
    """The compression that a file's name promises, or None."""
    return _SUFFIX.get(name.lower().rsplit(".", 1)[-1])


def open_stream(
    file: BinaryIO, kind: str | None, path: str | None = None, entry: Entry | None = None
) -> Opened:
    """The decompressed bytes of a file: from its start, or from somewhere nearer to an entry.

    Args:
        file: At its beginning; closing the stream may leave it open.
        kind: What by_content says of it.
        path: The same file, if it has one.
        entry: Where reading is to begin.
    """
    if kind == "bz2" and path is not None:
        reader = _Bz2(path, entry.bz2 if entry is not None else None)
        stream = cast(BinaryIO, io.BufferedReader(reader, CHUNK_BYTES))
        return Opened(stream, reader.first, reader.entry)
    if kind in ("zst", "lz4") and path is not None:
        file = cast(BinaryIO, pa.OSFile(path))  # read without Python
    if kind is not None:
        return Opened(_OPEN[kind](file), 0, lambda byte: None)
    first = file.seek(entry.at) if entry is not None else 0
    return Opened(file, first, lambda byte: None)


class _Bz2(io.RawIOBase):
    """Any number of bz2 streams; bytes behind the last one are an error (rapidgzip, like the
    bzip2 command, prints a warning and ignores them).

    Args:
        path: The file.
        begin: The block to begin with, instead of the first.

    first: the first byte that is read here, of all the decompressed bytes.
    """

    def __init__(self, path: str, begin: tuple[int, int, int] | None) -> None:
        self._whole = Path(path).open("rb")  # noqa: SIM115 - closed in close
        self.first = 0
        # one core: the pipeline's parallelism is over shards; 1.3 times the standard library here
        if begin is None:
            self._size_bytes = Path(path).stat().st_size
            self._entries = bz2_entry.Entries(self._whole, None)
            self._stream = rapidgzip.IndexedBzip2File(path, parallelization=1)
            return
        first = bz2_entry.Entry(*begin)
        rest = bz2_entry.Rest(Path(path).open("rb"), first)  # noqa: SIM115 - closed by its reader
        self.first, self._size_bytes = first.byte, rest.size_bytes
        self._entries = bz2_entry.Entries(self._whole, first, rest.head_bits, rest.head_bytes)
        self._stream = rapidgzip.IndexedBzip2File(rest, parallelization=1)
        self._stream.read(rest.head_bytes)

    def entry(self, byte: int) -> tuple[int, int, int] | None:
        """See Opened.bz2_at."""
        return self._entries.at(byte, self._stream.available_block_offsets())

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._stream.readinto(buffer))
        if not size and len(buffer):
            last_bit = max(self._stream.block_offsets()) + bz2_entry.TRAILER_BITS
            if -(-last_bit // 8) != self._size_bytes:
                raise EOFError("there are other bytes behind the last bz2 stream")
        return size

    def close(self) -> None:
        self._stream.close()
        self._whole.close()
        super().close()


def _in_a_row(file: BinaryIO, decoder: Callable[[], Any], padding: bytes = b"") -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Streams(file, decoder, padding), CHUNK_BYTES))


class _Streams(io.RawIOBase):
    """Any number of streams in a row by one of the standard library's decoders, which know where
    a stream ends: one that is cut off is an error, and so is what else comes behind it.

    Args:
        file: At the first stream.
        decoder: Makes the decoder of one stream.
        padding: Bytes that may stand between streams.
    """

    def __init__(self, file: BinaryIO, decoder: Callable[[], Any], padding: bytes) -> None:
        self._file, self._new, self._padding = file, decoder, padding
        self._decoder = decoder()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data.lstrip(self._padding)
                while not data:
                    if not (more := self._file.read(CHUNK_BYTES)):
                        return 0
                    data = more.lstrip(self._padding)
                self._decoder = self._new()
            elif self._decoder.needs_input and not (data := self._file.read(CHUNK_BYTES)):
                raise EOFError("the stream is cut off")
            if made := self._decoder.decompress(data, len(buffer)):
                buffer[: len(made)] = made
                return len(made)


class _Xz:
    """One xz stream, in bounded memory."""

    def __init__(self) -> None:
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def decompress(self, data: bytes, size: int) -> bytes:
        try:
            return self._decoder.decompress(data, size)
        except lzma.LZMAError as error:
            if "emory usage limit" not in str(error):
                raise
            raise ValueError(
                f"its dictionary needs more than {_XZ_MEMORY_BYTES >> 20} MiB: xz -9 makes a "
                "smaller one"
            ) from error


class Forward(io.RawIOBase):
    """A stream whose first bytes have been read already, and that can be skipped in but never
    gone back in: what a tar reader needs.

    Args:
        start: The bytes read so far.
        stream: The rest of them.
        position: Of the first byte.
    """

    def __init__(self, start: bytes, stream: BinaryIO, position: int = 0) -> None:
        self._start, self._stream = start, stream
        self._position = position

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
