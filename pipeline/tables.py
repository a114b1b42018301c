"""Documents in columns: parquet, and Arrow's IPC files and streams.

Runs in: decompressors. Only the columns of the text and of the filter are read. Memory is bounded
by a page of parquet, however large its row groups are, and by those columns of one record batch of
Arrow. Reading can begin at every row group and record batch.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import fields
from pipeline.blocks import Documents, Filtered, Texts
from pipeline.errors import ShardError
from pipeline.filters import is_text
from pipeline.messages import Entry
from pipeline.records import Wanted, bad, is_utf8, shown

ARROW_FILE = b"ARROW1\0\0"
ARROW_STREAM = b"\xff\xff\xff\xff"  # before the length of its first message
_STREAM_END = ARROW_STREAM + bytes(4)
_ROWS = 1024
_MAX_BATCH_BYTES = 1 << 26  # texts of that many rows; beyond it they are taken one by one
_BUFFER_BYTES = 1 << 20  # of a column's chunk; without it all of the chunk is read at once


# ── parquet ─────────────────────────────────────────────────────────────────────────────────


def parquet(file: BinaryIO, wanted: Wanted, begin: Entry) -> Documents:
    """The texts of a parquet file, from the row group begin.at on.

    Raises:
        ShardError: it has no such columns.
    """
    shard = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    metadata, schema = shard.metadata, shard.schema_arrow
    _check(schema, wanted)
    text = fields.leaf(schema, wanted.text)
    # a dictionary stays one: a small file may name one large text a million times
    shard = pq.ParquetFile(
        file,
        metadata=metadata,
        read_dictionary=[text],
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,
    )
    possible = _possible_groups(file, metadata, schema, wanted)
    for group in range(begin.at, metadata.num_row_groups):
        yield Entry(group)
        rows = metadata.row_group(group).num_rows
        if group not in possible:
            yield Filtered(rows)
            continue
        mask = _group_mask(shard, group, wanted)
        if mask is not None and len(mask) == rows and not mask.any():
            yield Filtered(rows)
            continue
        row = 0
        for batch in shard.iter_batches(_ROWS, row_groups=[group], columns=[text]):
            part = mask[row : row + len(batch)] if mask is not None else None
            column = fields.column(batch, wanted.text)
            yield from _documents(column, part, row, f"row group {group}")
            row += len(batch)
        if row != rows or (mask is not None and len(mask) != rows):
            raise ValueError(f"row group {group} has {row} rows and claims {rows}")


def _possible_groups(
    file: BinaryIO, metadata: pq.FileMetaData, schema: pa.Schema, wanted: Wanted
) -> set[int]:
    """Row groups that may hold a wanted row, as far as their statistics tell."""
    everything = set(range(metadata.num_row_groups))
    allowed = wanted.where.statistics(schema) if wanted.where is not None else None
    if allowed is None:
        return everything
    import pyarrow.dataset as ds  # takes 0.1 s

    # the footer alone: the data are not asked for
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    fragment = ds.ParquetFileFormat().make_fragment(pa.BufferReader(footer.getvalue()))
    return {part.row_groups[0].id for part in fragment.split_by_row_group(allowed, schema)}


def _group_mask(shard: pq.ParquetFile, group: int, wanted: Wanted) -> np.ndarray | None:
    """Which rows of a row group are wanted: bool, shape (rows,), from the filter's columns alone;
    None without a filter."""
    if wanted.where is None:
        return None
    schema = shard.schema_arrow
    columns = [
        fields.leaf(schema, column.path)
        for column in wanted.where.columns
        if fields.type_of(schema, column.path) is not None
    ]
    batches = shard.iter_batches(_ROWS, row_groups=[group], columns=columns)
    masks = [wanted.where.mask(batch) for batch in batches]
    return np.concatenate([np.zeros(0, bool), *masks])


# ── Arrow IPC ───────────────────────────────────────────────────────────────────────────────


def arrow(file: BinaryIO, path: str | None, wanted: Wanted, begin: Entry) -> Documents:
    """The texts of an Arrow file or stream, from the record batch begin.at on.

    Raises:
        ShardError: it has no such columns.
    """
    is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    file.seek(0)
    source = pa.OSFile(path) if path is not None else pa.PythonFile(file)
    with source:
        opener = pa.ipc.open_file if is_file else pa.ipc.open_stream
        schema = opener(source).schema
        _check(schema, wanted)
        source.seek(0)
        paths = [wanted.text, *(one.path for one in (wanted.where.columns if wanted.where else ()))]
        included = {schema.get_field_index(path[0]) for path in paths} - {-1}
        options = pa.ipc.IpcReadOptions(included_fields=sorted(included))
        reader = opener(source, options=options)
        for number, batch in enumerate(_batches(reader, is_file, begin.at), begin.at):
            yield Entry(number)
            sound = _sound(batch)
            mask = wanted.where.mask(sound) if wanted.where is not None else None
            column = fields.column(sound, wanted.text)
            for row in range(0, len(sound), _ROWS):
                part = mask[row : row + _ROWS] if mask is not None else None
                yield from _documents(column.slice(row, _ROWS), part, row, f"record batch {number}")
        if not is_file:
            _see_end(source)


def _batches(
    reader: pa.ipc.RecordBatchReader, is_file: bool, first: int
) -> Iterator[pa.RecordBatch]:
    """Record batches from one on; those of a stream before it are read and dropped."""
    if is_file:
        for number in range(first, reader.num_record_batches):
            yield reader.get_batch(number)
        return
    for number, batch in enumerate(reader):
        if number >= first:
            yield batch


def _see_end(source: pa.NativeFile) -> None:
    """A stream that was cut off between two messages looks complete but for its last bytes."""
    end = source.tell()
    source.seek(max(0, end - len(_STREAM_END)))
    if source.read(len(_STREAM_END)) != _STREAM_END:
        raise EOFError("the stream has no end")
    if source.read(1):
        raise ValueError("there are other bytes behind the stream's end")


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, after a look at every offset and index in it, which nobody has checked; texts as
    bytes, because one that is not UTF-8 is one record's fault.

    Raises:
        pa.ArrowInvalid: it is damaged.
    """
    columns = [_as_bytes(column) for column in batch.columns]
    for column in columns:
        column.validate(full=True)
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _as_bytes(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_dictionary(kind):
        values = _as_bytes(column.dictionary)
        values.validate(full=True)
        return pa.DictionaryArray.from_arrays(column.indices, values, safe=True)
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind)
    return column.view(raw) if raw is not None else column


# ── both ────────────────────────────────────────────────────────────────────────────────────


def _check(schema: pa.Schema, wanted: Wanted) -> None:
    """See that the table has the columns that are wanted. Raises: ShardError."""
    remedy = "name the text column with data.stream.text_field or --text-field"
    field, kind = fields.shown(wanted.text), fields.type_of(schema, wanted.text)
    if kind is None:
        there = shown(", ".join(schema.names))
        raise ShardError(f"{wanted.name} has no column {field!r}: it has {there}", remedy)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not is_text(kind) and not pa.types.is_null(kind):
        raise ShardError(
            f"{wanted.name}: its column {field!r} holds {shown(str(kind))}, not text", remedy
        )
    if wanted.where is not None:
        wanted.where.check(schema, wanted.name)


def _documents(column: pa.Array, mask: np.ndarray | None, first: int, group: str) -> Documents:
    """The wanted texts of consecutive rows, the first of which is row first of the group."""
    rows: np.ndarray | range = range(first, first + len(column))
    if mask is not None and not mask.all():
        yield Filtered(int(len(mask) - mask.sum()))
        column, rows = column.filter(pa.array(mask)), np.flatnonzero(mask) + first
    texts = _texts(column)
    if texts is not None:
        yield texts
        return
    for row, document in zip(rows, _one_by_one(column), strict=True):
        if isinstance(document, bytes):
            yield document
        else:
            yield bad(f"row {row} of {group}", document)


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


def _one_by_one(column: pa.Array) -> Iterator[bytes | str]:
    """The texts of a column as bytes, or what is wrong with one."""
    if pa.types.is_dictionary(column.type):
        values = list(_one_by_one(column.dictionary))
        for index in column.indices.to_pylist():
            yield "the text is null" if index is None else values[index]
        return
    for data in column.cast(pa.large_binary()).to_pylist():
        if data is None:
            yield "the text is null"
        else:
            yield data if is_utf8(data) else "the text is not UTF-8"
