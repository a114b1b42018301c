"""What a malformed shard is, its outcome, and the sound shards that they are made from."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard

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


def lz4(data: bytes) -> bytes:
    """A frame as the lz4 command writes it: independent blocks, a checksum of the content."""
    header = b"\x64\x70"  # independent blocks of 4 MiB at most, content checksum
    blocks = b""
    for at in range(0, len(data), 4 << 20):
        block = pa.compress(data[at : at + (4 << 20)], codec="lz4_raw", asbytes=True)
        blocks += len(block).to_bytes(4, "little") + block
    check = xxhash.xxh32_intdigest(header) >> 8 & 0xFF
    end = bytes(4) + xxhash.xxh32_intdigest(data).to_bytes(4, "little")
    return b"\x04\x22\x4d\x18" + header + bytes([check]) + blocks + end


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "zst": zst,
    "xz": lzma.compress,
    "lz4": lz4,
}


def noise(size: int) -> bytes:
    return np.random.default_rng(5).bytes(size)
