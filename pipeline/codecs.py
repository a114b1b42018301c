"""A shard's file into documents: what the format and compression are, and what is in it.

Runs in: decompressors. Memory is bounded by one member, line or row group.

    tar · jsonl, each plain, .bz2, .gz or .zst        parquet
    tar members: .json (a document), .jsonl (a document a line), .txt (the text itself)

The content decides; the name is asked only where content does not tell.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import rapidgzip
import webdataset.tariterators
import zstandard

from pipeline.errors import ShardError
from pipeline.messages import BadRecord

Documents = Iterator[bytes | BadRecord]

_CHUNK_BYTES = 1 << 20
_ZSTD_FEED_BYTES = 1 << 12  # a bomb's 4 KiB become 128 MiB at most
_ZSTD_MAX_WINDOW = 1 << 27  # `zstd --long` writes this
_MAX_RECORD_BYTES = 1 << 28  # a line or member beyond this is no document
_ROWS = 1024
_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,  # rapidgzip
    ValueError,
    zlib.error,
    zstandard.ZstdError,
    tarfile.TarError,
    pa.ArrowException,
)
_MAGIC = ((b"BZh", "bz2"), (b"\x1f\x8b", "gz"), (b"\x28\xb5\x2f\xfd", "zst"))


def open_documents(path: str, name: str, text_field: str) -> Documents:
    """The shard's texts as UTF-8 bytes, in order, with a BadRecord in the place of each that
    cannot be used.

    Args:
        path: Local file.
        name: The shard's name: for messages, and for the format where the content is silent.
        text_field: JSON field or parquet column that holds the text.

    Raises:
        ShardError: the file is damaged, cut off, or of no known form; says how far it was read.
    """
    done = 0
    try:
        for document in _documents(path, name, text_field):
            yield document
            done += 1
    except _DAMAGED as error:
        raise ShardError(
            f"{name} is damaged or cut off after record {done}: {type(error).__name__}: {error}",
            "fetch or make the shard again, or let the run go on without the rest of it with "
            "--max-bad-shards",
        ) from error


def _documents(path: str, name: str, field: str) -> Documents:
    with Path(path).open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith(b"PAR1"):
            yield from _parquet(file, name, field)
            return
        compression = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
        with _OPEN[compression](file, path) as stream:
            start = stream.read(512)
            rest = cast(BinaryIO, io.BufferedReader(_Rejoined(start, stream), _CHUNK_BYTES))
            match _container(start, name):
                case "tar":
                    yield from _tar(rest, field)
                case "jsonl":
                    yield from _lines(rest, field, "")
                case _:
                    raise ShardError(
                        f"{name} is of no known form: it begins with {start[:16]!r}",
                        "give tar, jsonl or parquet shards, plain or as .bz2, .gz or .zst",
                    )


def _container(start: bytes, name: str) -> str | None:
    """tar or jsonl, by the first 512 bytes of the decompressed stream, then by name."""
    if start[257:262] == b"ustar":
        return "tar"
    if start.lstrip()[:1] == b"{":
        return "jsonl"
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    if "tar" in parts or parts[-1] in ("tgz", "tbz2", "tbz"):
        return "tar"
    return "jsonl" if {"jsonl", "json", "ndjson"} & set(parts) else None


# ── compression ─────────────────────────────────────────────────────────────────────────────


def _bz2(file: BinaryIO, path: str) -> BinaryIO:
    # one core: the pipeline's parallelism is over shards; 1.3 times the standard library here
    return cast(BinaryIO, rapidgzip.IndexedBzip2File(path, parallelization=1))


def _gz(file: BinaryIO, path: str) -> BinaryIO:
    # rapidgzip is 1.7 times as fast, and takes a stream that is cut off for one that has ended
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _zst(file: BinaryIO, path: str) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Zstd(file), _CHUNK_BYTES))


_OPEN: dict[str | None, Callable[[BinaryIO, str], BinaryIO]] = {
    None: lambda file, path: file,
    "bz2": _bz2,
    "gz": _gz,
    "zst": _zst,
}


class _Zstd(io.RawIOBase):
    """Any number of zstd frames; one that is cut off is an error (zstandard's own stream reader
    takes it for the end)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._file.read(_ZSTD_FEED_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            self._frame = self._frame or self._context.decompressobj()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes have been read already."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        self._start, self._stream = start, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start or self._stream.read(len(buffer))
        self._start = data[len(buffer) :]
        size = min(len(buffer), len(data))
        buffer[:size] = data[:size]
        return size


# ── containers ──────────────────────────────────────────────────────────────────────────────


def _tar(stream: BinaryIO, field: str) -> Documents:
    decode = _json_decoder(field)
    for member in webdataset.tariterators.tar_file_iterator(stream):
        name, data = str(member["fname"]), cast(bytes, member["data"])
        suffix = name.rsplit(".", 1)[-1].lower()
        if suffix == "json":
            yield _document(decode, data, f"member {name}", field)
        elif suffix == "jsonl":
            yield from _lines(io.BytesIO(data), field, f"member {name}, ")
        elif suffix == "txt":
            yield _utf8(data, f"member {name}")


def _lines(stream: BinaryIO, field: str, where: str) -> Documents:
    """One document a line; empty lines are none."""
    decode = _json_decoder(field)
    number, tail = 0, b""
    while chunk := stream.read(_CHUNK_BYTES):
        lines = (tail + chunk).split(b"\n")
        tail = lines.pop()
        for line in lines:
            number += 1
            if line and not line.isspace():
                yield _document(decode, line, f"{where}line {number}", field)
        if len(tail) > _MAX_RECORD_BYTES:
            raise ValueError(f"line {number + 1} is longer than {_MAX_RECORD_BYTES} bytes")
    if tail and not tail.isspace():
        yield _document(decode, tail, f"{where}line {number + 1}", field)


def _parquet(file: BinaryIO, name: str, field: str) -> Documents:
    shard = pq.ParquetFile(file, pre_buffer=False)
    if field not in shard.schema_arrow.names:
        raise ShardError(
            f"{name} has no column {field!r}: it has {', '.join(shard.schema_arrow.names)}",
            "name the text column with data.stream.text_field or --text-field",
        )
    for group in range(shard.num_row_groups):
        row = 0
        for batch in shard.iter_batches(_ROWS, row_groups=[group], columns=[field]):
            for document in _column(batch.column(0)):
                if isinstance(document, bytes):
                    yield document
                else:
                    yield BadRecord(f"row {row} of row group {group}", document)
                row += 1


def _column(column: pa.Array) -> Iterator[bytes | str]:
    """The texts of a string column as bytes, or what is wrong with one."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.large_string())
    try:
        column.validate(full=True)
        checked = True
    except pa.ArrowInvalid:
        checked = False
    for value in column.cast(pa.large_binary()):
        data = value.as_py()
        if data is None:
            yield "the text is null"
        elif checked or _is_utf8(data):
            yield data
        else:
            yield "the text is not UTF-8"


# ── records ─────────────────────────────────────────────────────────────────────────────────


def _json_decoder(field: str) -> Callable[[bytes], Any]:
    """Decodes only the text of a JSON object; all else is skipped unread."""
    record = msgspec.defstruct(
        "Record", [("text", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)], rename={"text": field}
    )
    return msgspec.json.Decoder(record).decode


_decode_text = msgspec.json.Decoder(str).decode


def _document(
    decode: Callable[[bytes], Any], data: bytes, place: str, field: str
) -> bytes | BadRecord:
    try:
        raw = decode(data).text
        if raw is msgspec.UNSET:
            return BadRecord(place, f"it has no {field!r}")
        return cast(str, _decode_text(raw)).encode()
    except msgspec.ValidationError as error:
        return BadRecord(place, f"{field!r} is no text: {error}")
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return BadRecord(place, f"it is no JSON: {error}")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _utf8(data: bytes, place: str) -> bytes | BadRecord:
    return data if _is_utf8(data) else BadRecord(place, "the text is not UTF-8")
