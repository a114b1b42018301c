"""Every form of shard that is claimed: the same documents in each.

tests/places.py reads them out of every place, and makes the README's table.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

from pipeline.lines import SEPARATOR
from tests.corpus.base import TAR_END, lz4, member, zst

Row = dict[str, object]  # FineWeb's columns


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "bz2": lambda data: bz2.compress(data, 1),
    "gz": gzip.compress,
    "zst": zst,
    "xz": lambda data: lzma.compress(data, preset=0),
    "lz4": lz4,
}


# ── containers ──────────────────────────────────────────────────────────────────────────────


def jsonl(rows: Sequence[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tar(rows: Sequence[Row]) -> bytes:
    files = (member(f"{n:06d}.json", json.dumps(row).encode()) for n, row in enumerate(rows))
    return b"".join(files) + TAR_END


def tar_of_texts(rows: Sequence[Row]) -> bytes:
    files = (member(f"{n:06d}.txt", str(row["text"]).encode()) for n, row in enumerate(rows))
    return b"".join(files) + TAR_END


def tar_of_lines(compression: str) -> Callable[[Sequence[Row]], bytes]:
    """Seven rows a member, each a file of lines, compressed."""

    def make(rows: Sequence[Row]) -> bytes:
        name = f"jsonl.{compression}".rstrip(".")
        files = (
            member(f"part-{at:05d}.{name}", COMPRESSIONS[compression](jsonl(rows[at : at + 7])))
            for at in range(0, len(rows), 7)
        )
        return b"".join(files) + TAR_END

    return make


def txt(rows: Sequence[Row]) -> bytes:
    texts = (str(row["text"]).encode() + b"\n" + SEPARATOR + b"\n" for row in rows)
    return b"".join(texts)


def parquet(compression: str = "snappy") -> Callable[[Sequence[Row]], bytes]:
    def make(rows: Sequence[Row]) -> bytes:
        out = io.BytesIO()
        table = pa.Table.from_pylist(list(rows))
        pq.write_table(table, out, row_group_size=16, compression=compression)
        return out.getvalue()

    return make


def arrow(compression: str | None = None) -> Callable[[Sequence[Row]], bytes]:
    def make(rows: Sequence[Row]) -> bytes:
        out = io.BytesIO()
        feather.write_feather(
            pa.Table.from_pylist(list(rows)), out, compression or "uncompressed", chunksize=16
        )
        return out.getvalue()

    return make


def arrow_stream(rows: Sequence[Row]) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, 16)
    return out.getvalue()


# ── all of them ─────────────────────────────────────────────────────────────────────────────


class Form(NamedTuple):
    """A row of the README's table.

    columns: whether it has columns besides the text, so that filters work.
    """

    title: str
    name: str  # how its files are called, without the compression
    compressions: tuple[str, ...]
    make: Callable[[Sequence[Row]], bytes]
    jump: str  # where a resume begins to read
    columns: bool = True


_ANY = tuple(COMPRESSIONS)
_LINE = "the byte; bz2: its block; else decompressed up to it"
_BATCH = "the record batch"
FORMS: tuple[Form, ...] = (
    Form("tar of .json", "tar", _ANY, tar, _LINE),
    Form("tar of .txt", "txt.tar", _ANY, tar_of_texts, _LINE, False),
    *(
        Form(f"tar of .jsonl.{kind}".rstrip("."), "tar", ("",), tar_of_lines(kind), "the member")
        for kind in COMPRESSIONS
    ),
    Form("jsonl", "jsonl", _ANY, jsonl, _LINE),
    Form("txt, documents between separator lines", "txt", _ANY, txt, _LINE, False),
    *(
        Form(f"parquet, pages as {kind}", "parquet", ("",), parquet(kind), "the row group")
        for kind in ("snappy", "zstd", "gzip", "brotli", "lz4", "none")
    ),
    *(
        Form(f"arrow file, buffers as {kind or 'none'}", "arrow", ("",), arrow(kind), _BATCH)
        for kind in (None, "lz4", "zstd")
    ),
    Form("arrow stream", "arrow", ("",), arrow_stream, "the record batch, by reading up to it"),
)
