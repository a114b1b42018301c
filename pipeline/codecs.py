"""A shard's file into documents: what the format is, and what is in it.

Runs in: decompressors. Memory is bounded by one record: a line, a member, a page of a column.

    tar · jsonl, each plain, .bz2, .gz or .zst        parquet
    tar members: .json (a document), .jsonl (a document a line), .txt (the text itself)

The content decides; the name is asked only where content does not tell. What cannot be used is
never passed over in silence: one record is a BadRecord in its place, anything larger ends the
shard with a ShardError.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import compression, tar
from pipeline.blocks import Documents, Texts
from pipeline.errors import ShardError
from pipeline.records import bad, is_utf8, json_reader, shown

MAX_RECORD_BYTES = 1 << 26  # a line or member beyond this is no document
_ROWS = 1024
_MAX_BATCH_BYTES = 1 << 26  # texts of that many rows; beyond it they are taken one by one
_DAMAGED = (*compression.DAMAGED, MemoryError, tar.Error, pa.ArrowException)
_REMEDY = (
    "fetch or make the shard again, or let the run go on without the rest of it with "
    "--max-bad-shards"
)


def open_documents(path: str, name: str, text_field: str) -> Documents:
    """The shard's texts as UTF-8 bytes, in order, one by one or many in one buffer, with a
    BadRecord in the place of each that cannot be used.

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
            done += len(document.offsets) - 1 if isinstance(document, Texts) else 1
    except _DAMAGED as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise ShardError(f"{name} is damaged or cut off after record {done}: {why}", _REMEDY) from (
            error
        )


def _documents(path: str, name: str, field: str) -> Documents:
    with Path(path).open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith(b"PAR1"):
            yield from _parquet(file, name, field)
            return
        kind = compression.by_content(head)
        with compression.open_stream(file, path, kind) as stream:
            start = stream.read(512)
            container = _container(start, kind, name)
            rest = io.BufferedReader(compression.Forward(start, stream), compression.CHUNK_BYTES)
            if container == "tar":
                yield from _tar(cast(BinaryIO, rest), field)
            else:
                yield from _lines(cast(BinaryIO, rest), field, "")


def _container(start: bytes, kind: str | None, name: str) -> str:
    """tar or jsonl, by the first 512 bytes of the decompressed stream, then by name.

    Raises:
        ShardError: it is neither.
    """
    if start[257:262] == b"ustar":
        return "tar"
    if _first_line(start).lstrip()[:1] == b"{":
        return "jsonl"
    promised = compression.by_name(name)
    inner = compression.by_content(start)
    what = f"it begins with {start[:16]!r}"
    if kind is not None and (inner or start.startswith(b"PAR1")):
        what = f"what is inside its {kind} stream is {inner or 'parquet'} again"
    elif start.startswith(b"PARE"):
        what = "it is encrypted parquet"
    elif start.lstrip()[:1] == b"[":
        what = "it is a JSON array, not one object a line"
    elif promised and kind is None:
        what = f"its name promises {promised}, and {what if start else 'it is empty'}"
    else:
        parts = name.lower().rsplit("/", 1)[-1].split(".")
        if "tar" in parts or parts[-1] in ("tgz", "tbz2", "tbz"):
            return "tar"
        if {"jsonl", "json", "ndjson"} & set(parts):
            return "jsonl"
    raise ShardError(
        f"{name} is of no known form: {what}",
        "give tar, jsonl or parquet shards, the first two plain or as .bz2, .gz or .zst",
    )


def _first_line(data: bytes) -> bytes:
    """Without a byte order mark, which some editors put before the first line."""
    return data.removeprefix(b"\xef\xbb\xbf")


# ── tar ─────────────────────────────────────────────────────────────────────────────────────


def _tar(stream: BinaryIO, field: str) -> Documents:
    read = json_reader(field)
    for member in tar.members(stream, MAX_RECORD_BYTES):
        name = member.name
        suffix = name.rsplit(".", 1)[-1].lower()
        if suffix not in ("json", "jsonl", "txt") or _is_meta(name):
            continue
        place, data = f"member {name}", member.data
        if data is None:
            yield bad(place, "it is a link or a device, not a file")
        elif suffix == "jsonl":
            lines = io.BytesIO(data) if isinstance(data, bytes) else data
            yield from _lines(cast(BinaryIO, lines), field, f"{place}, ")
        elif not isinstance(data, bytes):
            yield bad(place, f"its {member.size} bytes are more than {MAX_RECORD_BYTES}")
        elif suffix == "json":
            yield read(data, place)
        else:
            yield data if is_utf8(data) else bad(place, "the text is not UTF-8")


def _is_meta(name: str) -> bool:
    """Members that webdataset's own reader skips: `__name__` and what lies in such a folder."""
    return name.startswith("__") and re.match(r"__[^/]*__($|/)", name) is not None


# ── jsonl ───────────────────────────────────────────────────────────────────────────────────


def _lines(stream: BinaryIO, field: str, where: str) -> Documents:
    """One document a line; empty lines are none."""
    read = json_reader(field)
    for number, line in enumerate(_split(stream), 1):
        if line is None:
            yield bad(f"{where}line {number}", f"it is longer than {MAX_RECORD_BYTES} bytes")
        elif line and not line.isspace():
            text = _first_line(line) if number == 1 else line
            yield read(text, f"{where}line {number}")


def _split(stream: BinaryIO) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is too long to be kept."""
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(compression.CHUNK_BYTES):
        start = 0
        # found one by one: bytes.split looks at every byte, four times as slow
        while (end := chunk.find(b"\n", start)) >= 0:
            size += end - start
            line = chunk[start:end]
            start = end + 1
            if size <= MAX_RECORD_BYTES:
                yield b"".join((*parts, line)) if parts else line
            else:
                yield None
            parts, size = [], 0
        size += len(chunk) - start
        parts = [*parts, chunk[start:]] if size <= MAX_RECORD_BYTES else []
    if size:
        yield b"".join(parts) if size <= MAX_RECORD_BYTES else None


# ── parquet ─────────────────────────────────────────────────────────────────────────────────


def _parquet(file: BinaryIO, name: str, field: str) -> Documents:
    shard = pq.ParquetFile(file, pre_buffer=False)
    columns = shard.schema_arrow.names
    if field not in columns:
        raise ShardError(
            f"{name} has no column {field!r}: it has {shown(', '.join(columns))}",
            "name the text column with data.stream.text_field or --text-field",
        )
    kind = shard.schema_arrow.field(field).type
    if not _is_text(kind):
        raise ShardError(
            f"{name}: its column {field!r} holds {shown(str(kind))}, not text",
            "name the text column with data.stream.text_field or --text-field",
        )
    # a dictionary stays one: a small file may name one large text a million times
    shard = pq.ParquetFile(file, metadata=shard.metadata, pre_buffer=False, read_dictionary=[field])
    for group in range(shard.num_row_groups):
        row = 0
        for batch in shard.iter_batches(_ROWS, row_groups=[group], columns=[field]):
            column = batch.column(0)
            texts = _texts(column)
            if texts is not None:
                yield texts
                row += len(column)
                continue
            for document in _column(column):
                if isinstance(document, bytes):
                    yield document
                else:
                    yield bad(f"row {row} of row group {group}", document)
                row += 1
        promised = shard.metadata.row_group(group).num_rows
        if row != promised:
            raise ValueError(f"row group {group} has {row} rows and claims {promised}")


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column's values can be texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    return kind in texts or pa.types.is_null(kind)


def _texts(column: pa.Array) -> Texts | None:
    """The texts of a column as one buffer, without copying them once more; None if one of them
    is null or no UTF-8, or if they are too large together."""
    if pa.types.is_dictionary(column.type):
        if column.dictionary.null_count or column.null_count:
            return None
        lengths = pc.binary_length(column.dictionary).to_numpy()
        if lengths[column.indices.to_numpy()].sum() > _MAX_BATCH_BYTES:
            return None
        column = column.dictionary_decode()
    if column.null_count:
        return None
    try:
        column = column.cast(pa.large_string())
        column.validate(full=True)
    except pa.ArrowInvalid:
        return None
    _, offsets, text = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return Texts(np.frombuffer(text or b"", np.uint8), bounds)


def _column(column: pa.Array) -> Iterator[bytes | str]:
    """The texts of a column as bytes, or what is wrong with one."""
    if pa.types.is_dictionary(column.type):
        values = list(_column(column.dictionary))
        for index in column.indices.to_pylist():
            yield "the text is null" if index is None else values[index]
        return
    for data in column.cast(pa.large_binary()).to_pylist():
        if data is None:
            yield "the text is null"
        else:
            yield data if is_utf8(data) else "the text is not UTF-8"
