"""A manifest: what is known of each shard of a set, one JSON object a line.

Runs in: supervisor and commands.

    {"name":"shard-00000.tar.bz2","size_bytes":48213377,"sha256":"9f86d0…","documents":16384}

A shard is known by its name: the address without secrets, or its last parts, so that a manifest
lies beside the shards wherever they are copied to. Every other key may be missing; what is there
is enforced. `shards make` writes one, a run keeps one of its own, and users write them by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from pipeline import durable
from pipeline.errors import ConfigError

FILE_NAME = "manifest.jsonl"  # what `shards make` writes beside the shards


class Entry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is known of one shard."""

    name: Annotated[str, msgspec.Meta(min_length=1)]  # address without secrets, or its end
    size_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None
    version: str = ""  # ETag or modification time, as the source says it
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    documents: Annotated[int, msgspec.Meta(ge=0)] | None = None
    url: str = ""  # where it lies, if not at its name
    pattern: str = ""  # what it was found by, without secrets


class Manifest:
    """Entries by name.

    Args:
        entries: In the order of the set.
        source: Where they are from, for messages.

    Raises:
        ConfigError: a shard is named twice.
    """

    def __init__(self, entries: Iterable[Entry], source: str) -> None:
        self.source = source
        self.entries: dict[str, Entry] = {}
        for entry in entries:
            if self.entries.setdefault(entry.name, entry) is not entry:
                raise ConfigError(f"{source}: {entry.name} stands there twice", "name it once")

    def find(self, name: str) -> Entry | None:
        """The entry of a shard: of its whole name, or else of the longest end of it, from a
        slash on, that has one."""
        while name not in self.entries:
            _, slash, name = name.partition("/")
            if not slash:
                return None
        return self.entries[name]


def read(path: Path) -> Manifest:
    """The manifest of a file; empty lines are passed over.

    Raises:
        ConfigError: it is not there, or a line is none of ours; says which.
    """
    try:
        return Manifest(_entries(path), str(path))
    except OSError as error:
        raise ConfigError(f"manifest {path}: {error.strerror}", "check its path") from None


def _entries(path: Path) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: {error}",
                    'a line is {"name": …} with size_bytes, version, sha256 and documents if known',
                ) from None


def encode(entries: Iterable[Entry]) -> bytes:
    """What stands in the file."""
    return msgspec.json.Encoder().encode_lines(list(entries))


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write it aside and rename it, durably: a reader finds all of it, or what was there before.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    durable.write(path, encode(entries))
