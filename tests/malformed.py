"""Malformed shards, made by code, each with its outcome: the table that the tests go through.

    python -m tests.malformed        prints the table for docs/RELIABILITY.md

Every shard here once held, or claims to hold, the same documents (TEXTS).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.messages import BadRecord
from tests.corpus.base import Case
from tests.corpus.nested import arrows, nested
from tests.corpus.records import parquets, records
from tests.corpus.streams import files, streams
from tests.corpus.tars import tars


def documents(path: Path, name: str) -> Iterator[bytes | BadRecord]:
    """What open_documents gives, document by document. Raises: ShardError."""
    for found in open_documents(str(path), name, "text"):
        if isinstance(found, Texts):
            yield from found.one_by_one()
        elif isinstance(found, bytes | BadRecord):
            yield found


CASES: tuple[Case, ...] = (
    *streams(), *files(), *tars(), *nested(), *records(), *parquets(), *arrows()
)  # fmt: skip


def table() -> str:
    """The cases as a Markdown table."""
    rows = [f"| {case.title} | `{case.name}` | {case.outcome} |" for case in CASES]
    head = ["| what is wrong | its name | outcome |", "|---|---|---|"]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(table())
