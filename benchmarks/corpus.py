"""Shards to measure on: any amount of text from a few real documents, in every format.

More text than there is comes from shuffling paragraphs among documents by a seed: the words and
their frequencies stay real, and no document appears twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import demo, sample_shards
from pipeline.sample_shards import write

__all__ = ["FORMATS", "documents", "source_documents", "write"]

FORMATS = ("tar.bz2", "jsonl.zst", "parquet")


def source_documents(folder: Path | None) -> list[str]:
    """Texts of the parquet files in a folder, or of this Python's own library."""
    if folder is None:
        return [text for _, text in demo.documents()]
    paths = sorted(folder.glob("*.parquet"))
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


def documents(originals: list[str], text_bytes: int, seed: int) -> Iterator[str]:
    """Documents of text_bytes in all: with seed 0 the originals, then reshuffled ones."""
    made = 0
    for text in originals if seed == 0 else ():
        yield text
        made += len(text.encode())
        if made >= text_bytes:
            return
    yield from sample_shards.long_texts(text_bytes - made, seed, originals)
