"""Small real disks for tests, and what a power loss may leave of a sequence of file operations."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# ── a small disk ────────────────────────────────────────────────────────────────────────────


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """Mount a tmpfs of this size on the folder, where the system lets us.

    Yields:
        Whether it is there; where it is not, tests make the writes fail at a fault point instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = (
        sys.platform == "linux"
        and os.geteuid() == 0
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Fill a disk up to leave_bytes with one file, and return it."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    with ballast.open("wb") as file:
        file.write(b"\1" * max(0, free - leave_bytes))
    return ballast


# ── recording file operations ───────────────────────────────────────────────────────────────


@dataclass
class Op:
    """One operation: what, on which path, and with what."""

    kind: str  # create, write, fsync, mkdir, rename, unlink, rmdir
    path: str
    at: int = 0
    data: bytes = field(default=b"", repr=False)
    to: str = ""


@dataclass
class Recorder:
    """Takes down what Python code does to files under a folder, in order."""

    root: Path
    ops: list[Op] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)  # open descriptors of folders

    def ours(self, path: Any) -> str | None:
        """The path below the root; None if it is not."""
        full = Path(self._paths.get(path, "") if isinstance(path, int) else path).absolute()
        return str(full.relative_to(self.root)) if full.is_relative_to(self.root) else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Operations of this block are taken down."""
        real_open, real_os_open, real_fsync = io.open, os.open, os.fsync

        def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            inside = self.ours(path) if not isinstance(path, int) else None
            if inside is None or mode != "wb":
                return real_open(path, mode, *args, **more)
            self.ops.append(Op("create", inside))
            return io.BufferedWriter(_Raw(path, inside, self))

        def os_opened(path: Any, *args: Any, **more: Any) -> int:
            descriptor = real_os_open(path, *args, **more)
            if not more.get("dir_fd"):
                self._paths[descriptor] = os.fspath(path)
            return descriptor

        def synced(descriptor: int) -> None:
            if descriptor in self._paths and (inside := self.ours(descriptor)) is not None:
                self.ops.append(Op("fsync", inside))
            real_fsync(descriptor)

        with ExitStack() as stack:
            for owner, name, fake in (
                (io, "open", opened),
                (os, "open", os_opened),
                (os, "fsync", synced),
                (os, "rename", self._noting(os.rename, "rename")),
                (os, "replace", self._noting(os.replace, "rename")),
                (os, "mkdir", self._noting(os.mkdir, "mkdir")),
                (os, "unlink", self._noting(os.unlink, "unlink")),
                (os, "rmdir", self._noting(os.rmdir, "rmdir")),
                (shutil, "rmtree", self._rmtree),
            ):
                stack.enter_context(mock.patch.object(owner, name, fake))
            yield

    def _noting(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def noted(path: Any, *args: Any, **more: Any) -> Any:
            result = real(path, *args, **more)
            if (inside := self.ours(path)) is not None:
                to = self.ours(args[0]) if kind == "rename" else None
                self.ops.append(Op(kind, inside, to=to or ""))
            return result

        return noted

    def _rmtree(self, path: Any, ignore_errors: bool = False) -> None:
        """As shutil's, in plain steps."""
        for entry in sorted(Path(path).iterdir()):
            (self._rmtree if entry.is_dir() else os.unlink)(entry)
        os.rmdir(path)  # noqa: PTH106 - the recorded one


class _Raw(io.FileIO):
    """A file whose writes are taken down."""

    def __init__(self, path: Any, inside: str, recorder: Recorder) -> None:
        super().__init__(path, "w")
        self._inside, self._recorder = inside, recorder
        recorder._paths[self.fileno()] = os.fspath(path)

    def write(self, data: Any) -> int:
        at, count = self.tell(), super().write(data)
        self._recorder.ops.append(Op("write", self._inside, at, bytes(data)[:count]))
        return count


# ── what a power loss leaves ────────────────────────────────────────────────────────────────


def after_power_loss(
    ops: list[Op], keep: Callable[[int], bool], torn: Callable[[int, int], int]
) -> dict[str, bytes]:
    """The files that are there after the machine lost power behind the last of ops.

    What an fsync has covered is there: the data of that file, or the names of that folder. Any
    other change of a name may have reached the disk or not, in any combination, and any other
    data as far as a random place. That is more than real file systems do to one.

    Args:
        ops: All operations before the loss.
        keep: Whether operation i, which nothing has made durable, has reached the disk.
        torn: Of operation i's so many bytes, how many have.

    Returns:
        Path → content.
    """
    names: dict[str, int] = {}  # path → number of the file
    folders = {"."}
    data: dict[int, bytearray] = {}
    where: dict[str, int] = {}  # path → file, as the program saw it
    for i, op in enumerate(ops):
        parent = str(Path(op.path).parent)
        later = ops[i + 1 :]
        if op.kind == "write":
            number = where[op.path]
            durable = any(o.kind == "fsync" and where.get(o.path) == number for o in later)
            count = len(op.data) if durable else torn(i, len(op.data))
            content = data[number]
            content.extend(b"\0" * (op.at - len(content)))
            content[op.at : op.at + count] = op.data[:count]
            continue
        if op.kind == "create":
            where[op.path] = i
            data[i] = bytearray()
        if op.kind == "rename":
            _move(where, op.path, op.to)
        if op.kind == "fsync":
            continue
        durable = any(o.kind == "fsync" and o.path == parent for o in later)
        if durable or keep(i):
            _apply(op, i, names, folders)
    return {
        path: bytes(data[number])
        for path, number in names.items()
        if all(str(parent) in folders for parent in Path(path).parents)
    }


def _apply(op: Op, number: int, names: dict[str, int], folders: set[str]) -> None:
    """One change of names that has reached the disk, as far as what it builds on has."""
    if op.kind == "create":
        names[op.path] = number
    elif op.kind == "mkdir":
        folders.add(op.path)
    elif op.kind == "unlink":
        names.pop(op.path, None)
    elif op.kind == "rmdir":
        folders.discard(op.path)
    elif op.kind == "rename":
        _move(names, op.path, op.to)
        for folder in [f for f in folders if f == op.path or f.startswith(f"{op.path}/")]:
            folders.discard(folder)
            folders.add(op.to + folder[len(op.path) :])


def _move(table: dict[str, Any], before: str, after: str) -> None:
    for path in [p for p in table if p == before or p.startswith(f"{before}/")]:
        table[after + path[len(before) :]] = table.pop(path)
