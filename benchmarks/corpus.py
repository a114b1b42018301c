"""Shards to measure on: any amount of text from a few real documents, in every format.

More text than there is comes from shuffling paragraphs among documents by a seed: the words and
their frequencies stay real, and no document appears twice.
"""

from __future__ import annotations

import bz2
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline import demo

FORMATS = ("tar.bz2", "jsonl.zst", "parquet")


def source_documents(folder: Path | None) -> list[str]:
    """Texts of the parquet files in a folder, or of this Python's own library."""
    if folder is None:
        return [text for _, text in demo.documents()]
    paths = sorted(folder.glob("*.parquet"))
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def documents(originals: list[str], text_bytes: int, seed: int) -> Iterator[str]:
    """Documents of text_bytes in all: the originals, then reshuffled ones."""
    made = 0
    for text in originals if seed == 0 else ():
        yield text
        made += len(text.encode())
        if made >= text_bytes:
            return
    rng = random.Random(seed)
    paragraphs = [part for text in originals for part in text.split("\n") if part.strip()]
    lengths = [text.count("\n") + 1 for text in originals]
    while made < text_bytes:
        text = "\n".join(rng.choices(paragraphs, k=rng.choice(lengths)))
        yield text
        made += len(text.encode())


def write(folder: Path, texts: list[str], num_shards: int, form: str) -> list[Path]:
    """The documents as shards of one format; a folder that is there already is taken as it is."""
    target = folder / form
    if target.exists():
        return sorted(target.glob(f"*.{form}"))
    partial = folder / f"{form}.partial"
    partial.mkdir(parents=True)
    per = -(-len(texts) // num_shards)
    for number in range(num_shards):
        part = texts[number * per : (number + 1) * per]
        (partial / f"shard-{number:05d}.{form}").write_bytes(_WRITERS[form](part))
    partial.rename(target)
    return sorted(target.glob(f"*.{form}"))


def _records(texts: list[str]) -> Iterator[dict[str, object]]:
    """FineWeb's columns."""
    for number, text in enumerate(texts):
        yield {
            "text": text,
            "id": f"<urn:uuid:{number:032x}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.com/{number}",
            "date": "2024-02-20T12:00:00Z",
            "language": "en",
            "language_score": 0.97,
            "token_count": len(text) // 4,
        }


def _tar_bz2(texts: list[str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for number, record in enumerate(_records(texts)):
            data = json.dumps(record, ensure_ascii=False).encode()
            info = tarfile.TarInfo(f"{number:08d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return bz2.compress(raw.getvalue())


def _jsonl_zst(texts: list[str]) -> bytes:
    lines = (json.dumps(record, ensure_ascii=False) for record in _records(texts))
    return zstandard.compress(("\n".join(lines) + "\n").encode())


def _parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(_records(texts))), out, row_group_size=1000)
    return out.getvalue()


_WRITERS = {"tar.bz2": _tar_bz2, "jsonl.zst": _jsonl_zst, "parquet": _parquet}
