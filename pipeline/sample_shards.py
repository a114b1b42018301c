"""Shards of any format made from texts: what costs are measured on, and what `bench` runs on.

Runs in: supervisor, and the command line for `plan` and `bench`.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import zstandard

FIELD = "text"


def short_texts() -> list[str]:
    """Of this Python's language reference: about 1 MB of English."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def long_texts(text_bytes: int, seed: int, originals: Sequence[str] = ()) -> Iterator[str]:
    """Documents of text_bytes in all: paragraphs shuffled among documents by a seed, so that the
    words and their frequencies stay real, and no document appears twice.

    Args:
        text_bytes: At least so much.
        seed: Another one gives other documents.
        originals: Real documents; none: this Python's library and its documentation.
    """
    real = list(originals) or _library()
    rng, made = random.Random(seed), 0
    paragraphs = [part for text in real for part in text.split("\n") if part.strip()]
    lengths = [text.count("\n") + 1 for text in real]
    while made < text_bytes:
        text = "\n".join(rng.choices(paragraphs, k=rng.choice(lengths)))
        yield text
        made += len(text.encode())


@functools.cache
def _library() -> list[str]:
    from pipeline import demo  # not by those who only measure costs

    return [text for _, text in demo.documents()]


def write(folder: Path, texts: Sequence[str], num_shards: int, form: str) -> list[Path]:
    """The documents as shards of one format; a folder that is there already is taken as it is."""
    target = folder / form
    if not target.exists():
        partial = folder / f"{form}.partial"
        partial.mkdir(parents=True)
        per = -(-len(texts) // num_shards)
        for number in range(num_shards):
            part = texts[number * per : (number + 1) * per]
            (partial / f"shard-{number:05d}.{form}").write_bytes(shard(form, part))
        partial.rename(target)
    return sorted(target.glob(f"*.{form}"))


def form_of(name: str) -> str:
    """A shard's format as its name tells it: tar.bz2, jsonl.zst, parquet …"""
    last = name.lower().rsplit("/", 1)[-1]
    for short, long in (("tgz", "tar.gz"), ("tbz2", "tar.bz2"), ("tbz", "tar.bz2"),
                        ("txz", "tar.xz"), ("tzst", "tar.zst")):  # fmt: skip
        last = last.removesuffix(short) + long if last.endswith(f".{short}") else last
    parts = last.split(".")
    container = next((part for part in parts if part in _CONTAINERS), "jsonl")
    whole = container in ("parquet", "arrow")
    compression = parts[-1] if parts[-1] in _COMPRESSIONS and not whole else ""
    return f"{container}.{compression}".rstrip(".")


def shard(form: str, texts: Sequence[str]) -> bytes:
    """The documents as one shard, with FineWeb's columns."""
    container, _, compression = form.partition(".")
    return _COMPRESSIONS[compression](_CONTAINERS[container](texts))


def _records(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts):
        yield {
            FIELD: text,
            "id": f"<urn:uuid:{number:032x}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.com/{number}",
            "date": "2024-02-20T12:00:00Z",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(text) // 4,
        }


def _jsonl(texts: Sequence[str]) -> bytes:
    return b"".join(msgspec.json.encode(one) + b"\n" for one in _records(texts))


def _tar(texts: Sequence[str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for number, record in enumerate(_records(texts)):
            data = msgspec.json.encode(record)
            member = tarfile.TarInfo(f"{number:08d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def _parquet(texts: Sequence[str]) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(_records(texts))), out, row_group_size=1000)
    return out.getvalue()


def _arrow(texts: Sequence[str]) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(list(_records(texts)))
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _lz4(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "lz4") as stream:
        stream.write(data)
    return bytes(out.getvalue())


_CONTAINERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "tar": _tar,
    "jsonl": _jsonl,
    "txt": lambda texts: b"\n<|endoftext|>\n".join(text.encode() for text in texts),
    "parquet": _parquet,
    "arrow": _arrow,
}
_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lambda data: lzma.compress(data, preset=1),
    "lz4": _lz4,
}
