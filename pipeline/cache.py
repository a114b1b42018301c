"""The cache folder: the names of its files, what it holds, and who owns it.

Runs in: supervisor (own, scan), fetchers and decompressors (names).

    <key>.partial                      being fetched
    <key>.<size>.<xxh3_64>.shard       whole: its name says what its bytes must be
    owner.lock                         locked by the run that owns the folder

Files of any other name are a stranger's: never counted, never deleted.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import CacheInUseError

LOCK_FILE = "owner.lock"
_NAME = re.compile(
    r"(?P<key>[0-9a-f]{16})\.(?:partial|(?P<size>\d+)\.(?P<digest>[0-9a-f]{16})\.shard)"
)


@dataclass(frozen=True)
class Entry:
    """What a file's name says. size_bytes and digest are None for a partial file."""

    key: str
    size_bytes: int | None
    digest: str | None


@dataclass(frozen=True)
class Whole:
    """A whole file in the cache."""

    path: Path
    size_bytes: int


@dataclass
class Contents:
    """What the cache holds, by shard key."""

    complete: dict[str, Whole] = field(default_factory=dict)
    partial: dict[str, int] = field(default_factory=dict)  # bytes so far


def partial_name(key: str) -> str:
    """Name of a shard that is being fetched."""
    return f"{key}.partial"


def file_name(key: str, size_bytes: int, digest: str) -> str:
    """Name of a whole shard; digest is its xxh3_64 in hexadecimal."""
    return f"{key}.{size_bytes}.{digest}.shard"


def parse(name: str) -> Entry | None:
    """What a name says, or None if it is not one of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    size = match["size"]
    return Entry(match["key"], int(size) if size else None, match["digest"])


def scan(folder: Path) -> Contents:
    """Our files in the folder; one whose size is not what its name says is deleted."""
    contents = Contents()
    for path in sorted(folder.iterdir()):
        entry = parse(path.name)
        if entry is None:
            continue
        size = path.stat().st_size
        if entry.size_bytes is None:
            contents.partial[entry.key] = size
        elif size == entry.size_bytes and entry.key not in contents.complete:
            contents.complete[entry.key] = Whole(path, size)
        else:
            path.unlink()
    return contents


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Own the folder, for as long as the block or the process lasts.

    If the machine was started again since, partial files are deleted: after a power loss their
    last bytes may never have reached the disk.

    Raises:
        CacheInUseError: another run owns it; names its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="ascii") as lock:
        lock.seek(0)
        before = lock.read().split()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = before[0] if before else "unknown"
            raise CacheInUseError(
                f"the cache folder {folder} belongs to a run that is going on (process {pid})",
                "wait for it, stop it, or give this run another --name or --cache-dir",
            ) from None
        boot = _boot_id()
        if before[1:] != [boot]:
            for path in folder.glob("*.partial"):
                if parse(path.name) is not None:
                    path.unlink()
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()} {boot}")
        lock.flush()
        yield


def _boot_id() -> str:
    """Something that changes whenever the machine starts."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = subprocess.run(
        ["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=True
    )
    return re.sub(r"\D+", "-", said.stdout.split("}")[0]).strip("-")
