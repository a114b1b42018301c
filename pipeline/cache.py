"""The cache folder: the names of its files, what it holds, and who owns it.

Runs in: supervisor (own, scan), fetchers and decompressors (names).

    <key>.partial                      being fetched
    <key>.<size>.<xxh3_64>.shard       whole: its name says what its bytes must be
    owner.lock                         locked by the run that owns the folder, and its children

Files of any other name are a stranger's: never counted, never deleted.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pipeline import durable
from pipeline.errors import CacheInUseError
from pipeline.faults import faultpoint

LOCK_FILE = "owner.lock"
_LINGER_S = 5.0  # the children of a supervisor that was killed end within a second
_LOCK_POLL_S = 0.02
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
def own(folder: Path) -> Iterator[int]:
    """Own the folder until the block and every process that has inherited the lock have ended.

    A run that was killed may have left a process that can still write (one that was stopped, or
    waits for a dead network disk): until it is gone the folder is not free.

    If the machine was started again since, partial files are deleted: after a power loss their
    last bytes may never have reached the disk.

    Yields:
        The lock's descriptor, for the run's children to inherit.

    Raises:
        CacheInUseError: another run owns it; names its process.
    """
    durable.make_folder(folder)
    with (folder / LOCK_FILE).open("a+", encoding="ascii") as lock:
        _lock(lock, folder)
        lock.seek(0)
        boot = _boot_id()
        if lock.read().split()[1:] != [boot]:
            for path in folder.glob("*.partial"):
                if parse(path.name) is not None:
                    path.unlink()
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()} {boot}")
        lock.flush()
        faultpoint("cache:locked")
        yield lock.fileno()


def _lock(lock: TextIO, folder: Path) -> None:
    """Take the lock; wait a little for the children of a supervisor that is dead."""
    deadline = time.monotonic() + _LINGER_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            lock.seek(0)
            said = lock.read().split()  # empty for an instant, while its owner writes it
            pid = int(said[0]) if said else None
            alive = pid is not None and _exists(pid)
            if alive or time.monotonic() > deadline:
                raise CacheInUseError(*_in_use(folder, pid, alive)) from None
        time.sleep(_LOCK_POLL_S)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _in_use(folder: Path, pid: int | None, alive: bool) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    if alive:
        return (
            f"the folder {folder} belongs to a run that is going on (process {pid})",
            "wait for it, stop it, or give this run another --name, --out or --cache-dir",
        )
    return (
        f"the folder {folder} belongs to a run that has ended (process {pid}), but one of its "
        "workers has not",
        "it is stopped, or waits for a disk: end the pipeline.child processes that are left",
    )


def _boot_id() -> str:
    """Something that changes whenever the machine starts."""
    if sys.platform == "linux":
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    said = subprocess.run(
        ["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=True
    )
    return re.sub(r"\D+", "-", said.stdout.split("}")[0]).strip("-")
