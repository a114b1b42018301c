"""Records into shard files of a wanted size and form, each under its name only when it is whole.

Runs in: processes of `shards make`.

    tar · jsonl, each plain, .bz2, .gz, .xz or .zst        parquet

A shard ends with the record that takes its file to the wanted size, so it is a little larger; what
a compressor still holds comes on top. The bytes depend on the records and the form alone: no time,
no user, no thread of a compressor has a part in them.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
import zstandard

from pipeline import durable
from pipeline.errors import ShardError
from pipeline.manifest import Entry

FORMS = ("tar.bz2", "tar.gz", "tar.xz", "tar.zst", "tar",
         "jsonl.zst", "jsonl.bz2", "jsonl.gz", "jsonl.xz", "jsonl", "parquet")  # fmt: skip
_ROWS = 1024  # of a parquet row group made of single records
_ENDLESS = 1 << 62
Record = bytes | pa.RecordBatch


class _Hashed(io.RawIOBase):
    """A file that knows the sha256 of what was written; forwards only."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.sha256, self.size = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(memoryview(data).cast("B"))
        return len(data)


_COMPRESS: dict[str, Callable[[Any], Any]] = {
    "bz2": lambda raw: bz2.BZ2File(raw, "wb"),
    "gz": lambda raw: gzip.GzipFile("", "wb", fileobj=raw, mtime=0),
    "xz": lambda raw: lzma.LZMAFile(raw, "wb"),  # noqa: SIM115 - closed with its shard
    "zst": lambda raw: zstandard.ZstdCompressor(write_checksum=True).stream_writer(
        raw, closefd=False
    ),
}


class Files:
    """The shards of one group, numbered from the first that is still to be made.

    Args:
        folder: Where they go.
        stem: What their names begin with; a number and the form follow.
        form: One of FORMS.
        first: Number of the first.
        done: Called when a shard is durable under its name, with its entry.
    """

    def __init__(
        self, folder: Path, stem: str, form: str, first: int, done: Callable[[Entry], None]
    ) -> None:
        self._folder, self._stem, self._form, self.number = folder, stem, form, first
        self._done = done
        self._compression = form.partition(".")[2]
        self._raw: _Hashed | None = None
        self._stream: Any = None
        self.documents = 0  # of the open shard

    @property
    def size_bytes(self) -> int:
        """What the open shard has on the disk."""
        return self._raw.size if self._raw else 0

    def open(self, name: str = "") -> BinaryIO:
        """Begin the next shard; what is written to the stream is compressed."""
        self._raw = _Hashed(self._path.with_name(self._path.name + ".partial"))
        compress = _COMPRESS.get(self._compression)
        self._stream = compress(self._raw) if compress else self._raw
        return cast(BinaryIO, self._stream)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._stem}-{self.number:04d}.{self._form}"

    def finish(self, name: str = "") -> None:
        """The open shard is whole: make it durable, then give it its name."""
        assert self._raw is not None
        if self._stream is not self._raw:
            self._stream.close()
        durable.sync(self._raw.file)
        self._raw.file.close()
        path = self._path
        path.with_name(path.name + ".partial").replace(path)
        durable.sync_folder(self._folder)
        self._done(
            Entry(
                name=path.name,
                size_bytes=self._raw.size,
                sha256=self._raw.sha256.hexdigest(),
                documents=self.documents,
            )
        )
        self.number, self.documents, self._raw = self.number + 1, 0, None

    def abandon(self) -> None:
        """Delete what there is of the open shard."""
        self._path.with_name(self._path.name + ".partial").unlink(missing_ok=True)


class Target(Protocol):
    """One form of shards."""

    def write(self, record: bytes, key: str) -> None:
        """A record, a JSON object on one line; key is its name where the form has one."""
        ...

    def write_rows(self, rows: pa.RecordBatch, key: Callable[[int], str]) -> None:
        """Many records at once; key names each."""
        ...

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        ...


class _ByRecord(ABC):
    """A form that takes records one by one."""

    @abstractmethod
    def write(self, record: bytes, key: str) -> None:
        """See Target."""

    def write_rows(self, rows: pa.RecordBatch, key: Callable[[int], str]) -> None:
        for number, row in enumerate(rows.to_pylist()):
            self.write(msgspec.json.encode(row, enc_hook=str), key(number))


class _Shards(webdataset.ShardWriter):  # type: ignore[misc]
    """WebDataset's writer, which ends a shard by what lies on the disk, not by what went in."""

    def __init__(self, files: Files, shard_bytes: int) -> None:
        self._files = files
        super().__init__("%d", maxcount=_ENDLESS, maxsize=shard_bytes, verbose=0,
                         opener=files.open, post=files.finish, compress=False, encoder=False,
                         mtime=0)  # fmt: skip

    def write(self, obj: dict[str, Any]) -> None:
        super().write(obj)
        self._files.documents += 1
        self.size = self._files.size_bytes


class _Tar(_ByRecord):
    """One .json member a document, with all its fields: WebDataset's form of FineWeb."""

    def __init__(self, files: Files, shard_bytes: int) -> None:
        self._files, self._bytes = files, shard_bytes
        self._writer: _Shards | None = None  # it opens its first shard when it is made

    def write(self, record: bytes, key: str) -> None:
        self._writer = self._writer or _Shards(self._files, self._bytes)
        self._writer.write({"__key__": key, "json": record})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Jsonl(_ByRecord):
    """A line a document."""

    def __init__(self, files: Files, shard_bytes: int) -> None:
        self._files, self._bytes = files, shard_bytes
        self._stream: BinaryIO | None = None

    def write(self, record: bytes, key: str) -> None:
        self._stream = self._stream or self._files.open()
        self._stream.write(record + b"\n")
        self._files.documents += 1
        if self._files.size_bytes >= self._bytes:
            self.close()

    def close(self) -> None:
        if self._stream is not None:
            self._stream = None
            self._files.finish()


class _Parquet:
    """A row a document; a shard has one schema: of its first rows, or of their table."""

    def __init__(self, files: Files, shard_bytes: int) -> None:
        self._files, self._bytes = files, shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._held: list[bytes] = []

    def write(self, record: bytes, key: str) -> None:
        self._held.append(record)
        if len(self._held) == _ROWS:
            self._flush()

    def write_rows(self, rows: pa.RecordBatch, key: Callable[[int], str]) -> None:
        self._flush()
        if self._writer is not None and self._writer.schema != rows.schema:
            self._end()
        self._write(pa.Table.from_batches([rows]))

    def _flush(self) -> None:
        held, self._held = self._held, []
        if not held:
            return
        rows = [msgspec.json.decode(record) for record in held]
        schema = self._writer.schema if self._writer else None
        unknown = {key for row in rows for key in row} - set(schema.names) if schema else set()
        try:
            if unknown:
                raise pa.ArrowInvalid(f"the first rows have no {min(unknown)!r}")
            table = pa.Table.from_pylist(rows, schema)
            if schema is None:
                names = dict.fromkeys(key for row in rows for key in row)
                table = pa.table({name: [row.get(name) for row in rows] for name in names})
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            upto = self._files.documents + len(rows)
            raise ShardError(
                f"{self._files._path.name}: its first {upto} rows do not fit one table: {error}",
                "make jsonl.zst, which keeps any fields",
            ) from error
        self._write(table)

    def _write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._files.open(), table.schema, compression="zstd")
        self._writer.write_table(table)
        self._files.documents += table.num_rows
        if self._files.size_bytes >= self._bytes:
            self._end()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._files.finish()

    def close(self) -> None:
        self._flush()
        self._end()


def target(files: Files, form: str, shard_bytes: int) -> Target:
    """The writer of a form."""
    kinds: dict[str, Callable[[Files, int], Target]] = {
        "tar": _Tar,
        "jsonl": _Jsonl,
        "parquet": _Parquet,
    }
    return kinds[form.partition(".")[0]](files, shard_bytes)
