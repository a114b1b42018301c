"""Bytes that survive the machine: what has been synced is there after a power loss.

Runs in: supervisor, writer, trainer. On macOS fsync only hands the bytes to the drive, which may
keep them in its cache and in any order; F_FULLFSYNC is what makes them durable there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO, Any

_FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS alone has it


def sync(file: IO[Any]) -> None:
    """Make everything written to an open file durable."""
    file.flush()
    _sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: files that were made, renamed or deleted in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    """Write a file aside and rename it: a reader finds all of it, or what was there before.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        sync(file)
    partial.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, durably; fine if it is there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    if _FULL_SYNC is not None:
        with contextlib.suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(descriptor, _FULL_SYNC)
