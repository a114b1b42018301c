"""Lines of JSON and columns of parquet that hold no text, or hide it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.base import (
    TEXTS,
    VALID,
    Case,
    Outcome,
    column,
    error,
    jsonl,
    line,
    noise,
    parquet,
    skipped,
)


def records() -> Iterator[Case]:
    """One odd line behind sound ones."""
    odd: list[tuple[str, bytes, Outcome]] = [
        ("text that is null", line(None), skipped(1, "no text")),
        ("text that is a number", line(5), skipped(1, "no text")),
        ("text that is an array", line(["a"]), skipped(1, "no text")),
        ("text that is an object", line({"text": "a"}), skipped(1, "no text")),
        ("text that is true", line(True), skipped(1, "no text")),
        ("no text", b'{"id": 1}\n', skipped(1, "has no 'text'")),
        ("an empty object", b"{}\n", skipped(1, "has no 'text'")),
        ("a line that is an array", b'["text", "a"]\n', skipped(1, "got `array`")),
        ("a line that is a string", b'"text"\n', skipped(1, "got `str`")),
        ("a line cut off", line("abc")[:-4] + b"\n", skipped(1, "no JSON")),
        ("two objects on a line", line("a")[:-1] * 2 + b"\n", skipped(1, "trailing characters")),
        ("NaN as text", b'{"text": NaN}\n', skipped(1, "no JSON")),
        ("NaN beside the text", b'{"score": NaN, "text": "a"}\n', skipped(1, "no JSON")),
        ("a number without bounds", b'{"n": 1e999999, "text": ' + json.dumps(TEXTS[-1]).encode()
         + b"}\n", VALID),
        ("depth 100,000 beside the text", deep(b'"text": "a", "x"'), skipped(1, "recursion")),
        ("depth 100,000 as text", deep(b'"text"'), skipped(1, "recursion")),
        ("a key twice: the last counts", b'{"text": "lost", "text": '
         + json.dumps(TEXTS[-1]).encode() + b"}\n", VALID),
        ("a lone high surrogate", b'{"text": "\\ud800"}\n', skipped(1, "no JSON")),
        ("a lone low surrogate", b'{"text": "\\udc00 "}\n', skipped(1, "no JSON")),
        ("an encoded surrogate", b'{"text": "\xed\xa0\x80"}\n', skipped(1, "no JSON")),
        ("an overlong NUL", b'{"text": "\xc0\x80"}\n', skipped(1, "no JSON")),
        ("a raw NUL in the text", b'{"text": "a\0b"}\n', skipped(1, "no JSON")),
        ("Latin-1 in the text", b'{"text": "caf\xe9"}\n', skipped(1, "no JSON")),
        ("a line of zeros", b"\0" * 1000 + b"\n", skipped(1, "no JSON")),
        ("single quotes", b"{'text': 'a'}\n", skipped(1, "no JSON")),
        ("no last line end", line(TEXTS[-1])[:-1], VALID),
        ("lines that end in CR LF", line(TEXTS[-1])[:-1] + b"\r\n", VALID),
    ]  # fmt: skip
    for title, data, outcome in odd:
        count = len(TEXTS) - 1 if outcome is VALID else len(TEXTS)
        make = lambda data=data, count=count: jsonl(count) + data  # noqa: E731
        yield Case(title, "x.jsonl", make, outcome)
    yield Case("jsonl cut in a line", "x.jsonl", lambda: jsonl()[:-9],
               skipped(1, "no JSON", len(TEXTS) - 1))  # fmt: skip


def deep(key: bytes) -> bytes:
    return b"{" + key + b": " + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


# ── parquet ─────────────────────────────────────────────────────────────────────────────────


def parquets() -> Iterator[Case]:
    """Columns that hold no text, footers that lie, and encryption."""
    named = lambda name: lambda: renamed(name)  # noqa: E731
    yield Case("no such column", "x.parquet", named("content"), error("has no column 'text'"))
    yield Case("a column of numbers", "x.parquet", lambda: column([1, 2]), error("holds int64"))
    yield Case("a column of lists", "x.parquet", lambda: column([["a"]]), error("holds list"))
    yield Case("a column of structs", "x.parquet", lambda: column([{"a": "b"}]), error("struct"))
    yield Case("null rows", "x.parquet", lambda: column([*TEXTS, None, None]), skipped(2, "null"))
    yield Case("only null rows", "x.parquet", lambda: column([None] * 3, pa.null()),
               skipped(3, "null", 0))  # fmt: skip
    yield Case("no rows", "x.parquet", lambda: column([], pa.string()), Outcome(0))
    yield Case("large strings", "x.parquet", lambda: column(TEXTS, pa.large_string()), VALID)
    yield Case("bytes that are UTF-8", "x.parquet",
               lambda: column([t.encode() for t in TEXTS]), VALID)  # fmt: skip
    yield Case("bytes that are not UTF-8", "x.parquet",
               lambda: column([*(t.encode() for t in TEXTS), b"\xff"]),
               skipped(1, "not UTF-8"))  # fmt: skip
    yield Case("a string that is not UTF-8", "x.parquet", not_utf8, skipped(1, "not UTF-8"))
    yield Case("a dictionary column", "x.parquet",
               lambda: column(pa.array(TEXTS).dictionary_encode()), VALID)  # fmt: skip
    for codec in ("none", "gzip", "zstd", "brotli", "lz4"):
        yield Case(f"pages as {codec}", "x.parquet", lambda c=codec: parquet(compression=c), VALID)
    yield Case("only the magic", "x.parquet", lambda: b"PAR1", error("damaged"))
    yield Case("the magic twice", "x.parquet", lambda: b"PAR1PAR1", error("damaged"))
    yield Case("a footer of zeros", "x.parquet",
               lambda: parquet()[:-500] + b"\0" * 492 + parquet()[-8:],
               error("damaged"))  # fmt: skip
    yield Case("a footer longer than the file", "x.parquet",
               lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", error("damaged"))  # fmt: skip
    yield Case("another end", "x.parquet", lambda: parquet()[:-4] + b"PAR2", error("damaged"))
    yield Case("garbage behind its end", "x.parquet", lambda: parquet() + b"?", error("damaged"))
    yield Case("a page of noise", "x.parquet", noisy_page, error("damaged", len(TEXTS)))
    yield Case("a row group that claims more rows", "x.parquet", claiming, error("claims", 60))
    yield Case("encrypted", "x.parquet", lambda: encrypted(False), error("encrypted parquet"))
    yield Case("an encrypted column", "x.parquet", lambda: encrypted(True), error("decrypt"))


def renamed(name: str) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({name: TEXTS}), out)
    return out.getvalue()


def not_utf8() -> bytes:
    """A string column with bytes that no writer of strings would let through."""
    out = io.BytesIO()
    table = pa.table({"text": [*TEXTS, "cafe-marker"]})
    pq.write_table(table, out, compression="none", use_dictionary=False, write_statistics=False)
    return out.getvalue().replace(b"cafe-marker", b"caf\xe9-marker")


def noisy_page() -> bytes:
    """The first text's page overwritten; the footer is sound."""
    data = parquet(compression="zstd", use_dictionary=False)
    at = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(1).data_page_offset
    return data[:at] + noise(400) + data[at + 400 :]


def claiming() -> bytes:
    """The data of a file of one row, and behind them the footer of a file of two."""
    short, long = column(TEXTS[:1]), column(TEXTS[:1] * 2)
    body = short[: -int.from_bytes(short[-8:-4], "little") - 8]
    footer = long[-int.from_bytes(long[-8:-4], "little") - 8 :]
    return body + footer


def encrypted(plain_footer: bool) -> bytes:
    """With keys from a key server that hands them out to anybody who made the file."""
    import base64

    import pyarrow.parquet.encryption as pe

    class Server(pe.KmsClient):  # type: ignore[misc]
        def __init__(self, config: object) -> None:
            super().__init__()

        def wrap_key(self, key: bytes, name: str) -> bytes:
            return base64.b64encode(key)

        def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
            return base64.b64decode(wrapped)

    config = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"key": ["text"]}, plaintext_footer=plain_footer
    )
    factory = pe.CryptoFactory(Server)
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    out = io.BytesIO()
    table = pa.table({"text": TEXTS})
    with pq.ParquetWriter(out, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return out.getvalue()
