"""Streams of every compression that are cut, altered or followed by something; odd files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator

from tests.corpus.base import (
    COMPRESS,
    TENTHS,
    TEXTS,
    VALID,
    Case,
    Outcome,
    error,
    jsonl,
    lz4,
    noise,
    parquet,
    skipped,
    tar,
    zst,
)


def streams() -> Iterator[Case]:
    """Every compression, every tenth of its length, and what may follow its end."""
    damaged = error("is damaged or cut off after record", len(TEXTS))
    forms: dict[str, Callable[[], bytes]] = {
        "jsonl.bz2": lambda: bz2.compress(jsonl()),
        "jsonl.gz": lambda: gzip.compress(jsonl()),
        "jsonl.zst": lambda: zst(jsonl()),
        "jsonl.xz": lambda: lzma.compress(jsonl()),
        "jsonl.lz4": lambda: lz4(jsonl()),
        "tar.bz2": lambda: bz2.compress(tar()),
        "tar": tar,
        "parquet": parquet,
    }
    for form, make in forms.items():
        for tenth in TENTHS:
            cut = lambda make=make, tenth=tenth: make()[: len(make()) * tenth // 10]  # noqa: E731
            yield Case(f"{form} cut at {tenth}/10", f"cut.{form}", cut, damaged)
    for form in ("jsonl.bz2", "jsonl.gz", "jsonl.zst", "jsonl.xz", "jsonl.lz4"):
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
                   lambda c=compress: c(b"")[:6], damaged)  # fmt: skip
        yield Case(f"{kind} of nothing", f"x.jsonl.{kind}", lambda c=compress: c(b""), Outcome(0))
        yield Case(f"{kind} of a parquet file", f"x.parquet.{kind}",
                   lambda c=compress: c(parquet()), error("parquet again"))  # fmt: skip
    yield Case("gz, then zeros", "x.jsonl.gz", lambda: gzip.compress(jsonl()) + b"\0" * 99, VALID)
    yield Case("bz2, then zeros", "x.jsonl.bz2", lambda: bz2.compress(jsonl()) + b"\0" * 9, damaged)
    skip = b"\x50\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped"
    yield Case("xz, then padding", "x.jsonl.xz", lambda: lzma.compress(jsonl()) + bytes(8), VALID)
    yield Case("xz with a dictionary of 512 MiB", "x.jsonl.xz", wide_xz, error("more than 256 MiB"))
    yield Case("lz4 frames to be skipped", "x.jsonl.lz4", lambda: skip + lz4(jsonl()) + skip, VALID)
    yield Case("lz4 of the old form", "x.jsonl.lz4", lambda: b"\x02\x21\x4c\x18" + noise(99),
               error("its name promises lz4"))  # fmt: skip
    yield Case("zst frames to be skipped", "x.jsonl.zst", lambda: skip + zst(jsonl()) + skip, VALID)


def wide_xz() -> bytes:
    wide = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 29}]
    return lzma.compress(jsonl(), filters=wide)


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
    yield from plain_texts()
    yield Case("a byte order mark", "x.jsonl", lambda: b"\xef\xbb\xbf" + jsonl(), VALID)
    yield Case("UTF-16", "x.jsonl", lambda: jsonl(3).decode().encode("utf-16"),
               skipped(4, "no JSON", 0))  # fmt: skip


def plain_texts() -> Iterator[Case]:
    """Text shards: one document, or many between separators."""
    whole = lambda: txt(TEXTS)  # noqa: E731
    yield Case("texts between separators", "x.txt", whole, VALID)
    yield Case("separators behind CR LF", "x.txt",
               lambda: b"".join(t.encode() + b"\r\n<|endoftext|>\r\n" for t in TEXTS),
               VALID)  # fmt: skip
    yield Case("two separators in a row", "x.txt",
               lambda: txt([TEXTS[0], "", *TEXTS[1:]]), VALID)  # fmt: skip
    yield Case("one text without a separator", "x.txt", TEXTS[0].encode, Outcome(1))
    yield Case("a text that is not UTF-8", "x.txt",
               lambda: whole() + b"caf\xe9\n<|endoftext|>\n", skipped(1, "not UTF-8"))  # fmt: skip
    yield Case("a byte order mark before the first text", "x.txt",
               lambda: b"\xef\xbb\xbf" + whole(), VALID)  # fmt: skip
    yield Case("no text at all", "x.txt", lambda: b"", Outcome(0))


def txt(texts: list[str]) -> bytes:
    return b"".join(text.encode() + b"\n<|endoftext|>\n" for text in texts)
