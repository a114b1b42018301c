"""Malformed shards, made by code, each with its outcome: the table that the tests go through.

    python -m tests.malformed        prints the table for docs/RELIABILITY.md

Every shard here once held, or claims to hold, the same documents (TEXTS).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.messages import BadRecord
from tests.harness import english

TEXTS = english(60, largest=3000)
TENTHS = range(1, 10)


@dataclass(frozen=True)
class Outcome:
    """What open_documents makes of a shard.

    documents: how many it gives, the first of TEXTS; with an error, at most so many come first.
    bad: records that are left out, counted and named; reason is part of what is said of each.
    error: part of the ShardError, or None if the shard can be read to its end.
    """

    documents: int = len(TEXTS)
    bad: int = 0
    reason: str = ""
    error: str | None = None

    def __str__(self) -> str:
        said = [f"{self.bad} skipped and counted: … {self.reason} …"] if self.bad else []
        said += [f"error: … {self.error} …"] if self.error else []
        return "; ".join(said) or ("valid" if self.documents else "valid, no documents")


@dataclass(frozen=True)
class Case:
    """One shard: what is wrong with it, its file name, its bytes, and what must come of it."""

    title: str
    name: str
    make: Callable[[], bytes]
    outcome: Outcome


def documents(path: Path, name: str) -> Iterator[bytes | BadRecord]:
    """What open_documents gives, document by document. Raises: ShardError."""
    for found in open_documents(str(path), name, "text"):
        if isinstance(found, Texts):
            yield from found.one_by_one()
        else:
            yield found


VALID = Outcome()


def error(what: str, documents: int = 0) -> Outcome:
    return Outcome(documents, error=what)


def skipped(bad: int, reason: str, documents: int = len(TEXTS)) -> Outcome:
    return Outcome(documents, bad, reason)


# ── sound shards ────────────────────────────────────────────────────────────────────────────


@cache
def jsonl(count: int = len(TEXTS)) -> bytes:
    return b"".join(line(text) for text in TEXTS[:count])


def line(text: object) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """Header, data and padding of one tar member; fields replace those of the header."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


TAR_END = b"\0" * 1024


@cache
def members() -> bytes:
    return b"".join(member(f"{n:06d}.json", line(text)) for n, text in enumerate(TEXTS))


def tar() -> bytes:
    return members() + TAR_END


@cache
def parquet(**options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), out, 16, **options)
    return out.getvalue()


def column(values: Sequence[object] | pa.Array, kind: pa.DataType | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(values, kind)}), out)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "zst": zst,
}


# ── cut and corrupted streams ───────────────────────────────────────────────────────────────


def streams() -> Iterator[Case]:
    """Every compression, every tenth of its length, and what may follow its end."""
    damaged = error("is damaged or cut off after record", len(TEXTS))
    forms: dict[str, Callable[[], bytes]] = {
        "jsonl.bz2": lambda: bz2.compress(jsonl()),
        "jsonl.gz": lambda: gzip.compress(jsonl()),
        "jsonl.zst": lambda: zst(jsonl()),
        "tar.bz2": lambda: bz2.compress(tar()),
        "tar": tar,
        "parquet": parquet,
    }
    for form, make in forms.items():
        for tenth in TENTHS:
            cut = lambda make=make, tenth=tenth: make()[: len(make()) * tenth // 10]  # noqa: E731
            yield Case(f"{form} cut at {tenth}/10", f"cut.{form}", cut, damaged)
    for form in ("jsonl.bz2", "jsonl.gz", "jsonl.zst"):
        for tenth in TENTHS:
            flip = lambda make=forms[form], tenth=tenth: flipped(make(), tenth)  # noqa: E731
            yield Case(f"{form} with a bit flipped at {tenth}/10", f"flip.{form}", flip, damaged)
    for kind, compress in COMPRESS.items():
        sound = lambda compress=compress: compress(jsonl())  # noqa: E731
        yield Case(f"{kind}, then garbage", f"x.jsonl.{kind}", lambda s=sound: s() + b"?", damaged)
        two = lambda c=compress: c(jsonl(20)) + c(b"") + c(jsonl()[len(jsonl(20)) :])  # noqa: E731
        yield Case(f"three {kind} streams in a row", f"x.jsonl.{kind}", two, VALID)
        twice = lambda c=compress: c(c(jsonl()))  # noqa: E731
        yield Case(f"{kind} inside {kind}", f"x.jsonl.{kind}", twice, error("is inside its"))
        yield Case(f"{kind} magic and nothing else", f"x.jsonl.{kind}",
                   lambda c=compress: c(b"")[:4], damaged)  # fmt: skip
        yield Case(f"{kind} of nothing", f"x.jsonl.{kind}", lambda c=compress: c(b""), Outcome(0))
        yield Case(f"{kind} of a parquet file", f"x.parquet.{kind}",
                   lambda c=compress: c(parquet()), error("parquet again"))  # fmt: skip
    yield Case("gz, then zeros", "x.jsonl.gz", lambda: gzip.compress(jsonl()) + b"\0" * 99, VALID)
    yield Case("bz2, then zeros", "x.jsonl.bz2", lambda: bz2.compress(jsonl()) + b"\0" * 9, damaged)
    skip = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped"
    yield Case("zst frames to be skipped", "x.jsonl.zst", lambda: skip + zst(jsonl()) + skip, VALID)


def flipped(data: bytes, tenth: int) -> bytes:
    at = len(data) * tenth // 10
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


# ── names and kinds of files ────────────────────────────────────────────────────────────────


def files() -> Iterator[Case]:
    """Empty files, wrong extensions, and files that are something else."""
    unknown = "is of no known form"
    yield Case("empty", "x.jsonl", lambda: b"", Outcome(0))
    for name in ("x.jsonl.bz2", "x.tar.gz", "x.jsonl.zst"):
        yield Case("empty", name, lambda: b"", error("it is empty"))
    yield Case("empty", "x.tar", lambda: b"", error("empty header"))
    yield Case("empty", "x.parquet", lambda: b"", error(unknown))
    yield Case("only line ends", "x.jsonl", lambda: b"\n\r\n \n", Outcome(0))
    for name in ("x.tar", "x.parquet", "x", "x.jsonl.bz2"):
        yield Case("jsonl under another name", name, jsonl, VALID)
    yield Case("gz named .bz2", "x.jsonl.bz2", lambda: gzip.compress(jsonl()), VALID)
    yield Case("tar.bz2 named .jsonl", "x.jsonl", lambda: bz2.compress(tar()), VALID)
    yield Case("parquet named .tar", "x.tar", parquet, VALID)
    html = b"<!DOCTYPE html><title>Sign in</title>"
    yield Case("a web page", "x.jsonl.gz", lambda: html, error("its name promises gz"))
    yield Case("a web page", "x.parquet", lambda: html, error(unknown))
    yield Case("a web page", "x.jsonl", lambda: html, skipped(1, "no JSON", 0))
    yield Case("random bytes", "x.bin", lambda: noise(5000), error(unknown))
    yield Case("random bytes", "x.tar", lambda: noise(5000), error("invalid header"))
    yield Case("7z", "x.7z", lambda: b"7z\xbc\xaf\x27\x1c" + noise(99), error(unknown))
    yield Case("a JSON array", "x.json", lambda: json.dumps([{"text": "a"}]).encode(),
               error("JSON array"))  # fmt: skip
    yield Case("a byte order mark", "x.jsonl", lambda: b"\xef\xbb\xbf" + jsonl(), VALID)
    yield Case("UTF-16", "x.jsonl", lambda: jsonl(3).decode().encode("utf-16"),
               skipped(4, "no JSON", 0))  # fmt: skip


def noise(size: int) -> bytes:
    return np.random.default_rng(5).bytes(size)


# ── tar ─────────────────────────────────────────────────────────────────────────────────────


def tars() -> Iterator[Case]:
    """Members that are no documents, headers that lie, ends that are none."""
    more = lambda *extra: lambda: b"".join((*extra, tar()))  # noqa: E731
    longest = "long/" * 60 + "name.json"
    yield Case("a long name", "x.tar", more(long_name(longest, b"{}")), skipped(1, "has no 'text'"))
    yield Case("a bad checksum", "x.tar", lambda: altered(20, 150), error("bad checksum", 20))
    yield Case("no end of the archive", "x.tar", members, error("empty header", len(TEXTS)))
    yield Case("one block of zeros as its end", "x.tar", lambda: members() + b"\0" * 512, VALID)
    yield Case("half a block at its end", "x.tar", lambda: tar() + b"\0" * 99,
               error("truncated header", len(TEXTS)))  # fmt: skip
    yield Case("garbage behind its end", "x.tar", lambda: tar() + noise(512),
               error("invalid header", len(TEXTS)))  # fmt: skip
    yield Case("two archives in a row", "x.tar", more(TAR_END), VALID)
    for what, kind in (("symbolic link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE),
                       ("device", tarfile.CHRTYPE), ("named pipe", tarfile.FIFOTYPE)):  # fmt: skip
        yield Case(f"a {what}", "x.tar", more(member("a.json", b"", kind)), skipped(1, "a link"))
        yield Case(f"a {what} called a.png", "x.tar", more(member("a.png", b"", kind)), VALID)
    yield Case("a folder", "x.tar", more(member("a.json/", b"", tarfile.DIRTYPE)), VALID)
    yield Case("other files", "x.tar", more(member("a.jpg", noise(999))), VALID)
    yield Case("meta data of webdataset", "x.tar", more(member("__meta__/a.json", b"{}")), VALID)
    yield Case("a negative size", "x.tar", lambda: resized(-512), error("claims -512 bytes"))
    for size in (10**10, 1 << 62):
        yield Case(f"a member of {size} bytes that is not there", "x.tar",
                   lambda size=size: resized(size),
                   Outcome(0, 1, "are more than", "unexpected end of data"))  # fmt: skip
        yield Case(f"a .jsonl member of {size} bytes that is not there", "x.tar",
                   lambda size=size: resized(size, "a.jsonl"),
                   error("unexpected end of data", 1))  # fmt: skip
    yield Case("a long name of 10 GB", "x.tar",
               lambda: resized(10**10, "././@LongLink", tarfile.GNUTYPE_LONGNAME),
               error("claims 10000000000 bytes"))  # fmt: skip
    yield Case("attributes of 10 GB", "x.tar",
               lambda: resized(10**10, "pax", tarfile.XHDTYPE), error("claims"))  # fmt: skip
    yield Case("an attribute that claims a negative size", "x.tar",
               lambda: pax(b"size", b"-1024") + tar(), error("claims -1024 bytes"))  # fmt: skip
    for value in (b"x", b"9" * 5000):
        yield Case(f"an attribute that claims {len(value)} characters as a size", "x.tar",
                   lambda value=value: pax(b"size", value) + tar(),
                   Outcome(0, 1, "truncated", "invalid header"))  # fmt: skip
    yield Case("an attribute that is longer than its block", "x.tar",
               lambda: member("p", b"99999 path=a\n", tarfile.XHDTYPE) + tar(),
               error("damaged"))  # fmt: skip
    yield Case("attributes without end", "x.tar",
               lambda: b"".join(pax(b"path", b"a", tarfile.XGLTYPE) for _ in range(2000)),
               error("damaged"))  # fmt: skip
    yield Case("a sparse member", "x.tar",
               more(member("a.json", b"", tarfile.GNUTYPE_SPARSE)), error("sparse"))  # fmt: skip
    yield Case("a name of control characters", "x.tar",
               more(member("\x1b[2J\n.json", b"{}")), skipped(1, "has no 'text'"))  # fmt: skip
    yield Case("a .txt that is no UTF-8", "x.tar", more(member("a.txt", b"\xff\xfe")),
               skipped(1, "not UTF-8"))  # fmt: skip
    texts = lambda: b"".join(member("a.txt", text.encode()) for text in TEXTS)  # noqa: E731
    yield Case(".txt members", "x.tar", lambda: texts() + TAR_END, VALID)
    yield Case("a .jsonl member", "x.tar", lambda: member("a.jsonl", jsonl()) + TAR_END, VALID)


def long_name(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def altered(index: int, offset: int) -> bytes:
    """The tar with one byte changed in the header of one member."""
    at = sum(len(member("x", line(text))) for text in TEXTS[:index]) + offset
    return tar()[:at] + bytes([tar()[at] ^ 1]) + tar()[at + 1 :]


def resized(size: int, name: str = "a.json", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar whose first member claims a size: its data are all that follows."""
    return member(name, b"", kind, size=size) + line(TEXTS[0]) + b"\0" * 512


def pax(key: bytes, value: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with one attribute."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest) + 4))
    return member("pax", str(length).encode() + rest, kind)


# ── records ─────────────────────────────────────────────────────────────────────────────────


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


CASES: tuple[Case, ...] = (*streams(), *files(), *tars(), *records(), *parquets())


def table() -> str:
    """The cases as a Markdown table."""
    rows = [f"| {case.title} | `{case.name}` | {case.outcome} |" for case in CASES]
    head = ["| what is wrong | its name | outcome |", "|---|---|---|"]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(table())
