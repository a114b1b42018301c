"""A shard's file into documents: what the format is, and what is in it.

Runs in: decompressors. Memory is bounded by one record: a line, a member, a page of a column.

    tar · jsonl · txt, each plain, .bz2, .gz, .zst, .xz or .lz4        parquet · arrow
    tar members: .json (a document), .jsonl (a document a line), .txt (the text itself), each
    plain or compressed again

The content decides; the name is asked only where content does not tell. What cannot be used is
never passed over in silence: one record is a BadRecord in its place, anything larger ends the
shard with a ShardError.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import pyarrow as pa

from pipeline import compression, fields, lines, tables, tar
from pipeline.blocks import Documents, Filtered, Item, Texts
from pipeline.errors import ShardError
from pipeline.filters import Where
from pipeline.lines import ENTRY_BYTES, MAX_RECORD_BYTES
from pipeline.messages import BadRecord, Entry
from pipeline.records import JsonReader, PlainText, Wanted, bad, json_reader, shown, text_reader

Records = Generator[bytes | pa.RecordBatch | BadRecord, None, None]  # what open_records gives
_DAMAGED = (*compression.DAMAGED, MemoryError, tar.Error, pa.ArrowException)
_REMEDY = (
    "fetch or make the shard again, or let the run go on without the rest of it with "
    "--max-bad-shards"
)
_KNOWN = "give tar, jsonl, txt, parquet or arrow shards, the first three plain or compressed"


def open_documents(
    source: str | BinaryIO,
    name: str,
    text_field: str,
    *,
    where: Where | None = None,
    begin: Entry | None = None,
) -> Documents:
    """The shard's texts as UTF-8 bytes, in order, one by one or many in one buffer, with a
    BadRecord in the place of each that cannot be used. Between them stand those that the filter
    has left out, counted, and the entries at which reading could begin as well.

    Args:
        source: A local file, or an open one at its start, which is closed in the end.
        name: The shard's name: for messages, and for the format where the content is silent.
        text_field: JSON field or column that holds the text: pipeline/fields.py.
        where: Only documents for which this holds.
        begin: An entry that reading told before: begin there.

    Raises:
        ShardError: the file is damaged, cut off, or of no known form, says how far it was read; or
            it lacks a column.
    """
    wanted = Wanted(name, fields.parse(text_field), where)
    return cast(Documents, _read(source, wanted, begin or Entry()))


def open_records(source: str | BinaryIO, name: str, text_field: str) -> Records:
    """The same records with all their fields, in the same order: a JSON object each (as it stands
    in the shard; a plain text becomes one), or many as rows of a table. Arguments and errors as of
    open_documents."""
    for item in _read(source, Wanted(name, fields.parse(text_field), whole=True), Entry()):
        match item:
            case PlainText():
                yield msgspec.json.encode({"text": item.decode()})
            case bytes() | pa.RecordBatch() | BadRecord():
                yield item


def _read(source: str | BinaryIO, wanted: Wanted, begin: Entry) -> Iterator[Item | pa.RecordBatch]:
    done, name = begin.records, wanted.name
    try:
        for document in _documents(source, wanted, begin):
            match document:
                case Entry():
                    yield msgspec.structs.replace(document, records=done)
                    continue
                case pa.RecordBatch():
                    done += document.num_rows
                case Texts():
                    done += len(document.offsets) - 1
                case Filtered():
                    done += document.number
                case _:
                    done += 1
            yield document
    except _DAMAGED as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise ShardError(f"{name} is damaged or cut off after record {done}: {why}", _REMEDY) from (
            error
        )


def _documents(
    source: str | BinaryIO, wanted: Wanted, begin: Entry
) -> Iterator[Item | pa.RecordBatch]:
    path = source if isinstance(source, str) else None
    with ExitStack() as stack:
        file = stack.enter_context(_opened(source))
        head = file.read(8)
        file.seek(0)
        if head.startswith(b"PAR1"):
            yield from (
                tables.rows(file, wanted) if wanted.whole else tables.parquet(file, wanted, begin)
            )
            return
        if head == tables.ARROW_FILE or head.startswith(tables.ARROW_STREAM):
            yield from tables.arrow(file, path, wanted, begin)
            return
        kind = compression.by_content(head, compression.by_name(wanted.name))
        opened = compression.open_stream(file, kind, path)
        start = stack.enter_context(opened.stream).read(512)
        container = _container(start, kind, wanted.name)
        if begin.at:
            file = stack.enter_context(_opened(source))
            file.seek(0)
            start, opened = b"", compression.open_stream(file, kind, path, begin)
            stack.enter_context(opened.stream)
        forward = compression.Forward(start, opened.stream, opened.position)
        stream = cast(BinaryIO, io.BufferedReader(forward, compression.CHUNK_BYTES))
        while (left := begin.at - stream.tell()) > 0:
            if not stream.read(min(ENTRY_BYTES, left)):
                raise EOFError(f"it ends before byte {begin.at}, which was read before")
            yield Filtered(0)  # nothing yet, but work goes on
        for document in _READERS[container](stream, wanted, begin):
            if isinstance(document, Entry):
                yield msgspec.structs.replace(document, bz2=opened.bz2_at(document.at))
            else:
                yield document


def _opened(source: str | BinaryIO) -> BinaryIO:
    return Path(source).open("rb") if isinstance(source, str) else source


def _container(start: bytes, kind: str | None, name: str) -> str:
    """tar, jsonl or txt, by the first 512 bytes of the decompressed stream, then by name.

    Raises:
        ShardError: it is none of them.
    """
    if start[257:262] == b"ustar":
        return "tar"
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    promised = compression.by_name(name)
    inner = compression.by_content(start)
    what = f"it begins with {start[:16]!r}"
    if kind is not None and (inner or start.startswith((b"PAR1", b"ARROW1"))):
        within = inner or ("arrow" if start.startswith(b"ARROW1") else "parquet")
        what = f"what is inside its {kind} stream is {within} again"
    elif promised and kind is None and not _is_json(start):
        what = f"its name promises {promised}, and {what if start else 'it is empty'}"
    elif {"txt", "text"} & {*parts[1:]}:
        return "txt"
    elif _is_json(start):
        return "jsonl"
    elif start.startswith(b"PARE"):
        what = "it is encrypted parquet"
    elif start.lstrip()[:1] == b"[":
        what = "it is a JSON array, not one object a line"
    elif "tar" in parts or parts[-1] in ("tgz", "tbz2", "tbz", "txz", "tzst"):
        return "tar"
    elif {"jsonl", "json", "ndjson"} & set(parts):
        return "jsonl"
    raise ShardError(f"{name} is of no known form: {what}", _KNOWN)


def _is_json(start: bytes) -> bool:
    return lines.first_line(start).lstrip()[:1] == b"{"


# ── tar ─────────────────────────────────────────────────────────────────────────────────────


def _tar(stream: BinaryIO, wanted: Wanted, begin: Entry) -> Documents:
    read, read_text = json_reader(wanted), text_reader(wanted)
    told = begin.at
    for member in tar.members(stream, MAX_RECORD_BYTES):
        if member.offset is not None and member.offset >= told + ENTRY_BYTES:
            told = member.offset
            yield Entry(told)
        plain, suffix = _suffix(member.name)
        if suffix not in ("json", "jsonl", "ndjson", "txt") or _is_meta(member.name):
            continue
        place, data = f"member {member.name}", member.data
        if data is None:
            yield bad(place, "it is a link or a device, not a file")
        elif suffix in ("jsonl", "ndjson") or not plain:
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            yield from _file(file, suffix, read_text if suffix == "txt" else read, place)
        elif not isinstance(data, bytes):
            yield bad(place, f"its {member.size} bytes are more than {MAX_RECORD_BYTES}")
        else:
            yield read_text(data, place) if suffix == "txt" else read(data, place)


def _file(file: BinaryIO, suffix: str, read: JsonReader, place: str) -> Documents:
    """The documents of a member that is a file of lines, or compressed, or both."""
    head = file.read(8)
    file.seek(0)
    kind = compression.by_content(head)
    stream = compression.open_stream(file, kind).stream
    try:
        if suffix in ("jsonl", "ndjson"):
            yield from lines.documents(stream, read, f"{place}, ")
            return
        data = stream.read(MAX_RECORD_BYTES + 1)
        if len(data) > MAX_RECORD_BYTES:
            yield bad(place, f"it has more than {MAX_RECORD_BYTES} bytes")
            while stream.read(compression.CHUNK_BYTES):
                pass
        else:
            yield read(data, place)
    except compression.DAMAGED as error:
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error


def _suffix(name: str) -> tuple[bool, str]:
    """Whether a member's name promises no compression, and the suffix that says what it is."""
    compressed = compression.by_name(name)
    *_, last = (name.rsplit(".", 1)[0] if compressed else name).lower().rsplit(".", 1)
    return compressed is None, last


def _is_meta(name: str) -> bool:
    """Members that webdataset's own reader skips: `__name__` and what lies in such a folder."""
    return name.startswith("__") and re.match(r"__[^/]*__($|/)", name) is not None


_READERS: dict[str, Callable[[BinaryIO, Wanted, Entry], Documents]] = {
    "tar": _tar,
    "jsonl": lambda stream, wanted, begin: lines.documents(
        stream, json_reader(wanted), begin=begin
    ),
    "txt": lambda stream, wanted, begin: lines.texts(stream, text_reader(wanted), begin),
}
