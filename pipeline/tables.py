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
from pipeline.blocks import Documents, Filtered, Item, Texts
from pipeline.errors import ShardError
from pipeline.filters import Where, is_text
from pipeline.messages import BadRecord, Entry
from pipeline.records import Wanted, bad, is_utf8, shown

ARROW_FILE = b"ARROW1\0\0"
ARROW_STREAM = b"\xff\xff\xff\xff"  # before the length of its first message
_STREAM_END = ARROW_STREAM + bytes(4)
_ROWS = 1024
_MAX_BATCH_BYTES = 1 << 26  # texts of that many rows; beyond it they are taken one by one
_MAX_DECODED_BYTES = 1 << 28  # of a batch of parquet, if every row is as large as can be
_BUFFER_BYTES = 1 << 20


# ── parquet ─────────────────────────────────────────────────────────────────────────────────


def parquet(file: BinaryIO, wanted: Wanted, begin: Entry) -> Documents:
    """The texts of a parquet file, from the row group begin.at on.

    Raises:
        ShardError: it has no such columns.
    """
    shard = _Parquet(file, wanted)
    possible = _possible_groups(shard, wanted)
    for group in range(begin.at, shard.metadata.num_row_groups):
        yield Entry(group)
        rows = shard.metadata.row_group(group).num_rows
        mask = None
        if group in possible and wanted.where is not None:
            mask = shard.mask(group, wanted.where)
        if group not in possible or (mask is not None and len(mask) == rows and not mask.any()):
            yield Filtered(rows)
            continue
        row = 0
        for batch in shard.texts(group):
            part = mask[row : row + len(batch)] if mask is not None else None
            column = fields.column(batch, wanted.text)
            yield from _documents(column, part, row, f"row group {group}")
            row += len(batch)
        if row != rows or (mask is not None and len(mask) != rows):
            raise ValueError(f"row group {group} has {row} rows and claims {rows}")


def rows(file: BinaryIO, wanted: Wanted) -> Iterator[pa.RecordBatch | BadRecord]:
    """All columns of a parquet file, a row without text taken out of its batch.

    Raises:
        ShardError: it has no column of texts by that name.
    """
    shard = _Parquet(file, wanted)
    for group in range(shard.metadata.num_row_groups):
        row = 0
        for batch in shard.whole(group):
            yield from _with_text(batch, wanted, row, f"row group {group}")
            row += len(batch)
        if row != shard.metadata.row_group(group).num_rows:
            raise ValueError(f"row group {group} has {row} rows and claims more")


class _Parquet:
    """A parquet file, read in batches of few bytes whatever its row groups hold.

    Raises:
        ShardError: it has no such columns.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self._file = file
        # without a buffer all of a column's chunk is read at once
        self._plain = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        self.metadata, self.schema = self._plain.metadata, self._plain.schema_arrow
        _check(self.schema, wanted)
        self._text = [fields.leaf(self.schema, wanted.text)]
        asked = wanted.where.columns if wanted.where is not None else ()
        there = [one.path for one in asked if fields.type_of(self.schema, one.path) is not None]
        self._asked = [fields.leaf(self.schema, path) for path in there]
        columns = self.metadata.schema
        leaves = {columns.column(number).path for number in range(len(columns))}
        self._as_dictionary = pq.ParquetFile(
            file,
            metadata=self.metadata,
            read_dictionary=sorted(leaves & {*self._text, *self._asked}),
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
        )

    def texts(self, group: int) -> Iterator[pa.RecordBatch]:
        """The text's column of a row group."""
        return self._batches(group, self._text)

    def whole(self, group: int) -> Iterator[pa.RecordBatch]:
        """All columns of a row group."""
        count = self._rows_at_once(group, self.schema.names)
        return self._plain.iter_batches(count, row_groups=[group])

    def mask(self, group: int, where: Where) -> np.ndarray:
        """Which rows of a row group are wanted, by the filter's columns alone: bool, (rows,)."""
        masks = [where.mask(batch) for batch in self._batches(group, self._asked)]
        return np.concatenate([np.zeros(0, bool), *masks])

    def _batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """In a small row group a dictionary stays one, because it may name a large text a million
        times; in a large one pyarrow would gather all of it."""
        which = {"row_groups": [group], "columns": columns}
        if self.metadata.row_group(group).total_byte_size <= _MAX_BATCH_BYTES:
            return self._as_dictionary.iter_batches(_ROWS, **which)
        # pyarrow ends the process where the next line asks for a column that is encrypted
        next(self._plain.iter_batches(1, **which), None)
        return self._plain.iter_batches(self._rows_at_once(group, columns), **which)

    def _rows_at_once(self, group: int, columns: list[str]) -> int:
        """How many rows of some columns may be decoded together."""
        whole, size, largest = self.metadata.row_group(group), 0, 1
        for number in range(whole.num_columns):
            path = self.metadata.schema.column(number).path
            if any(f"{path}.".startswith(f"{name}.") for name in columns):
                chunk = whole.column(number)
                size += chunk.total_uncompressed_size
                if chunk.has_dictionary_page:  # any row may be the largest text in it
                    largest += self._dictionary_bytes(chunk.dictionary_page_offset)
        most = max(largest, 4 * size // max(1, whole.num_rows))
        return max(1, min(_ROWS, _MAX_DECODED_BYTES // most))

    def _dictionary_bytes(self, offset: int) -> int:
        """The size of a dictionary page, from its header: pyarrow does not tell it."""
        self._file.seek(offset)
        header = self._file.read(16)
        if header[:3] != b"\x15\x04\x15":  # thrift: its kind is dictionary; its size follows
            raise ValueError("a dictionary page has no header")
        size = 0
        for place, byte in enumerate(header[3:]):
            size |= (byte & 127) << 7 * place
            if byte < 128:
                break
        return size >> 1


def _possible_groups(shard: _Parquet, wanted: Wanted) -> set[int]:
    """Row groups that may hold a wanted row, as far as their statistics tell."""
    allowed = wanted.where.statistics(shard.schema) if wanted.where is not None else None
    if allowed is None:
        return set(range(shard.metadata.num_row_groups))
    import pyarrow.dataset as ds  # takes 0.1 s

    footer = io.BytesIO()  # alone: the data are not asked for
    shard.metadata.write_metadata_file(footer)
    fragment = ds.ParquetFileFormat().make_fragment(pa.BufferReader(footer.getvalue()))
    parts = fragment.split_by_row_group(allowed, shard.schema)
    return {part.row_groups[0].id for part in parts}


# ── Arrow IPC ───────────────────────────────────────────────────────────────────────────────


def arrow(
    file: BinaryIO, path: str | None, wanted: Wanted, begin: Entry
) -> Iterator[Item | pa.RecordBatch]:
    """The texts of an Arrow file or stream, or its rows whole, from the record batch begin.at on.

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
        options = pa.ipc.IpcReadOptions(included_fields=[] if wanted.whole else sorted(included))
        reader = opener(source, options=options)
        for number, batch in enumerate(_batches(reader, is_file, begin.at), begin.at):
            yield Entry(number)
            sound = _sound(batch)
            if wanted.whole:
                for row in range(0, len(sound), _ROWS):
                    part = batch.slice(row, _ROWS)
                    yield from _with_text(part, wanted, row, f"record batch {number}")
                continue
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


def _with_text(
    batch: pa.RecordBatch, wanted: Wanted, first: int, group: str
) -> Iterator[pa.RecordBatch | BadRecord]:
    """A batch, or its rows one by one where some of them have no text."""
    column = fields.column(batch, wanted.text)
    if _texts(column) is not None:
        yield batch
        return
    for row, text in enumerate(_one_by_one(column)):
        if isinstance(text, bytes):
            yield batch.slice(row, 1)
        else:
            yield bad(f"row {first + row} of {group}", text)


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
