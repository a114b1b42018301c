"""Documents in lines: JSON, one object a line, and plain text.

Runs in: decompressors. Memory is bounded by one record.

A plain text is one document, as a .txt member of a tar is. Many documents in one file are
separated by a line that holds nothing but <|endoftext|>, as in TinyStories and llm.c; the line
ends around it belong to no document.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipeline import compression
from pipeline.blocks import Documents
from pipeline.messages import Entry
from pipeline.records import JsonReader, bad

MAX_RECORD_BYTES = 1 << 26  # a line, member or text beyond this is no document
ENTRY_BYTES = 1 << 22  # entries are so far apart, or further
SEPARATOR = b"<|endoftext|>"
_MARK = b"\xef\xbb\xbf"  # a byte order mark, which some editors put before the first line


def first_line(data: bytes) -> bytes:
    """Without a byte order mark."""
    return data.removeprefix(_MARK)


def documents(
    stream: BinaryIO, read: JsonReader, where: str = "", begin: Entry | None = None
) -> Documents:
    """One document a line; empty lines are none.

    Args:
        stream: At the start of a line.
        read: Reads one.
        where: Of the stream, for messages: 'member a.jsonl, '.
        begin: What the stream's start is; entries are told only if it is given.
    """
    number = begin.lines if begin is not None else 0
    told = position = begin.at if begin is not None else 0
    for start, lines in _groups(stream):
        if begin is not None and position + start >= told + ENTRY_BYTES:
            told = position + start
            yield Entry(told, lines=number)
        for line in lines:
            number += 1
            if line is None:
                reason = f"it is longer than {MAX_RECORD_BYTES} bytes"
                yield bad(f"{where}line {number}", reason)
            elif line and not line.isspace():
                text = first_line(line) if number == 1 else line
                yield read(text, f"{where}line {number}")


def _groups(stream: BinaryIO) -> Iterator[tuple[int, list[bytes | None]]]:
    """Lines without their ends, None for one that is too long to be kept: those that begin in
    one chunk of the stream, and where the first of them does."""
    lines: list[bytes | None] = []
    first = position = size = 0
    parts: list[bytes] = []
    while chunk := stream.read(compression.CHUNK_BYTES):
        # found one by one: bytes.split looks at every byte, four times as slow
        start = chunk.find(b"\n") + 1
        begun = chunk[: start - 1] if start else chunk
        size += len(begun)
        parts = [*parts, begun] if size <= MAX_RECORD_BYTES else []
        if start:
            lines.append(b"".join(parts) if size <= MAX_RECORD_BYTES else None)
            yield first, lines
            first, lines = position + start, []
            while (end := chunk.find(b"\n", start)) >= 0:
                lines.append(chunk[start:end])
                start = end + 1
            parts, size = [chunk[start:]], len(chunk) - start
        position += len(chunk)
    if size:
        lines.append(b"".join(parts) if size <= MAX_RECORD_BYTES else None)
    yield first, lines


# ── plain text ──────────────────────────────────────────────────────────────────────────────


def texts(stream: BinaryIO, read: JsonReader, begin: Entry) -> Documents:
    """The documents of a plain text.

    Args:
        stream: At the start of a document.
        read: Reads one.
        begin: What the stream's start is.
    """
    number = begin.lines
    told = begin.at
    for start, text in _separated(stream):
        if start and begin.at + start >= told + ENTRY_BYTES:
            told = begin.at + start
            yield Entry(told, lines=number)
        number += 1
        if text is None:
            reason = (
                f"it is longer than {MAX_RECORD_BYTES} bytes: a text shard is one document, or "
                f"several separated by lines of {SEPARATOR.decode()}"
            )
            yield bad(f"text {number}", reason)
        elif text := first_line(text) if number == 1 else text:
            yield read(text, f"text {number}")


def _separated(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Where each text begins, and the text; None for one that is too long to be kept."""
    held, first, size = bytearray(), 0, 0
    at_end = False
    while not at_end:
        chunk = stream.read(compression.CHUNK_BYTES)
        at_end = not chunk
        looked = max(0, len(held) - len(SEPARATOR) - 2)
        held += chunk
        size += len(chunk)
        while (found := _separator(held, looked, at_end)) is not None:
            end, behind = found
            kept = size - len(held) + end <= MAX_RECORD_BYTES
            yield first, bytes(held[:end]) if kept else None
            first += size - len(held) + behind
            del held[:behind]
            looked, size = 0, len(held)
        if size > MAX_RECORD_BYTES:  # only where a separator may have begun is still of use
            del held[: -len(SEPARATOR) - 3]
    if size:
        yield first, bytes(held) if size <= MAX_RECORD_BYTES else None


def _separator(held: bytearray, start: int, at_end: bool) -> tuple[int, int] | None:
    """The end of the text before the next separator, and the start of the one behind it."""
    while (at := held.find(SEPARATOR, start)) >= 0:
        begin, behind = at, at + len(SEPARATOR)
        rest = bytes(held[behind : behind + 2])
        if len(rest) < 2 and not at_end and rest != b"\n":
            return None  # more has to be read to see what it is
        ends = next((end for end in (b"\n", b"\r\n") if rest.startswith(end)), None)
        if (ends is not None or (at_end and not rest)) and bytes(held[begin - 1 : begin]) in (
            b"",
            b"\n",
        ):
            begin -= 1 if begin else 0
            if held[begin - 1 : begin] == b"\r":
                begin -= 1
            return begin, behind + len(ends or b"")
        start = at + 1
    return None
