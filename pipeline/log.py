"""The run's log files, and the only code that writes them: log.txt, metrics.jsonl and
bad_records.jsonl.

Runs in: supervisor. The files stay inside a number of bytes, always: one that is full becomes
its own `.1`, in the place of the one before.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import structlog

from pipeline.faults import faultpoint
from pipeline.status import DiskStatus

_FILES = ("log.txt", "metrics.jsonl", "bad_records.jsonl")


_render = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=24)
_json = msgspec.json.Encoder(enc_hook=str).encode


class _Rotating:
    """One file and its predecessor, together at most max_bytes."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._old = path, path.with_name(f"{path.name}.1")
        self._half = max_bytes // 2
        for existing in (path, self._old):
            if existing.exists() and existing.stat().st_size > self._half:
                existing.unlink()  # written under a larger limit
        self._old_bytes = self._old.stat().st_size if self._old.exists() else 0
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._bytes = path.stat().st_size

    @property
    def bytes(self) -> int:
        return self._bytes + self._old_bytes

    def write(self, line: builtins.bytes) -> None:
        """Append a line; one longer than half the limit is cut."""
        line = line if len(line) < self._half else line[: self._half - 1] + b"\n"
        if self._bytes + len(line) > self._half:
            self._rotate()
        try:
            faultpoint("log:before_write")
            written = self._file.write(line) or 0
        except OSError:
            written = 0
        if written < len(line):  # the disk is full: half a line would damage the next one
            self._file.truncate(self._bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._bytes += written

    def _rotate(self) -> None:
        """The file becomes the old one. If its folder does not allow that, nothing changes."""
        self._path.replace(self._old)
        fresh = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = fresh
        self._old_bytes, self._bytes = self._bytes, 0

    def close(self) -> None:
        self._file.close()


class RunLog:
    """All log files of one run.

    Args:
        run_dir: Where they stand.
        max_bytes: What they may hold together.
    """

    def __init__(self, run_dir: Path, max_bytes: int) -> None:
        self._files = {name: _Rotating(run_dir / name, max_bytes // len(_FILES)) for name in _FILES}
        self.lost_lines = 0  # the disk was full

    @property
    def bytes(self) -> int:
        """Bytes of all files now."""
        return sum(file.bytes for file in self._files.values())

    def event(self, level: str, event: str, **fields: Any) -> None:
        """A line of log.txt; a bad record stands in bad_records.jsonl as well. The
        reporter has taken secrets out of the fields."""
        if event == "bad_record":
            self._write("bad_records.jsonl", _json(fields) + b"\n")
        line = _render(None, level, {"timestamp": _now(), "level": level, "event": event, **fields})
        self._write("log.txt", f"{line}\n".encode())

    def step(self, record: dict[str, Any], disk: DiskStatus) -> None:
        """One update: a line for people in log.txt, everything in metrics.jsonl."""
        self._write("log.txt", f"{_now()} {step_line(record, disk)}\n".encode())
        self._write("metrics.jsonl", _json({"time": _now(), **record}) + b"\n")

    def _write(self, name: str, line: builtins.bytes) -> None:
        try:
            self._files[name].write(line)
        except OSError:  # a full disk must not end the run; the view shows how many were lost
            self.lost_lines += 1

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


def step_line(metrics: dict[str, Any], disk: DiskStatus) -> str:
    """One update in one line: loss, perplexity, tokens/s, total tokens, learning rate, disk."""
    return (
        f"step {metrics['step']:>6} | loss {metrics['loss']:.4f} | ppl {metrics['ppl']:.2f} | "
        f"tok/s {metrics['tokens_per_s']:.0f} | tokens {metrics['total_tokens']} | "
        f"lr {metrics['lr']:.3e} | disk {disk.used_bytes / 1e9:.3f}/{disk.budget_bytes / 1e9:.3f} "
        f"GB | data wait {100 * metrics['data_wait_share']:.1f} %"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
