"""What the stream depends on, in words and as a fingerprint.

Runs in: supervisor. Pure.

A cursor points into one stream. The entries here are all that decides which stream that is; the
number of workers, the budget and the batch size are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import xxhash

from pipeline import filters
from pipeline.catalog import Shard
from pipeline.config import Config, Filter
from pipeline.errors import CursorMismatchError
from pipeline.messages import Cursor
from pipeline.redaction import redact


def identity(
    config: Config,
    shards: Sequence[Shard],
    lanes: int,
    *,
    mix: str = "",
    held_out: bool = False,
) -> dict[str, str]:
    """Everything that the tokens depend on, as text a person can compare.

    Args:
        config: The run's.
        shards: The catalog.
        lanes: Number of lanes.
        mix: The data sets' weights and lanes, if there are several.
        held_out: The stream is that of the documents that training does not see.
    """
    listing = xxhash.xxh3_128_hexdigest(
        msgspec.json.encode([(shard.name, shard.size_bytes, shard.version) for shard in shards])
    )
    stream, tokenizer = config.data.stream, config.data.tokenizer
    validation = config.data.validation
    apart = [redact(pattern) for pattern in validation.shards]
    return ({"data.stream.mix": mix} if mix else {}) | {
        "shards": f"{len(shards)} shards, {listing}",
        "data.stream.text_field": stream.text_field,
        "data.stream.lanes": str(lanes),
        "data.stream.shuffle": str(stream.shuffle),
        "data.stream.block_bytes": str(stream.block_bytes),
        "data.filter": _filter(config.data.filter),
        "data.validation.shards": ", ".join(apart) or "none",
        "data.validation.share": f"{validation.share}{', held out' if held_out else ''}",
        "data.tokenizer.name": tokenizer.name,
        "data.tokenizer.vocab_size": str(tokenizer.vocab_size),
        "data.preprocessing.max_context_size": str(config.data.preprocessing.max_context_size),
        "system.seed": str(config.system.seed) if stream.shuffle else "none",
    }


def _filter(chosen: Filter) -> str:
    lengths = f"{chosen.min_chars or 0} to {chosen.max_chars or 'any'} characters"
    limited = chosen.min_chars is not None or chosen.max_chars is not None
    parts = [filters.condition(chosen), lengths if limited else ""]
    return ", ".join(part for part in parts if part) or "none"


def fingerprint(entries: dict[str, str]) -> str:
    """A short hash of the identity."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(sorted(entries.items())))


def refuse_other(cursor: Cursor, entries: dict[str, str], where: str) -> None:
    """Refuse a cursor of another stream.

    Args:
        cursor: From a checkpoint.
        entries: The identity of this run.
        where: The checkpoint, for the message.

    Raises:
        CursorMismatchError: names every entry that differs.
    """
    if cursor.fingerprint == fingerprint(entries):
        return
    differing = [
        f"{key}: {cursor.identity.get(key, 'absent')} then, {entries.get(key, 'absent')} now"
        for key in sorted(cursor.identity | entries)
        if cursor.identity.get(key) != entries.get(key)
    ]
    raise CursorMismatchError(
        f"{where} belongs to another token stream: " + "; ".join(differing or ["other version"]),
        "resume with the same shards and settings, or start over with --fresh",
    )
