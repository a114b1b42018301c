"""What a campaign measures: memory, descriptors and disk over time, and what is left behind.

Runs in: chaos.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_MEMORY_SLACK = 1.2
_MEMORY_SLACK_BYTES = 48 << 20
_DESCRIPTOR_SLACK = 12  # a worker that is just being replaced has its ends open twice
_ENOUGH = 40  # samples; with fewer nothing is said about flatness


@dataclass
class Series:
    """One quantity over time."""

    name: str
    values: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """First, last and largest value, and the medians of the second and the last quarter."""
        if not self.values:
            return {}
        early, late = self._quarters()
        return {
            "first": self.values[0],
            "last": self.values[-1],
            "max": max(self.values),
            "second_quarter": early,
            "last_quarter": late,
        }

    def _quarters(self) -> tuple[float, float]:
        quarter = max(1, len(self.values) // 4)
        second = self.values[quarter : 2 * quarter] or self.values
        return statistics.median(second), statistics.median(self.values[-quarter:])

    def grew(self, factor: float, slack: float) -> bool:
        """Whether the last quarter lies clearly above the second one."""
        if len(self.values) < _ENOUGH:
            return False
        early, late = self._quarters()
        return late > early * factor + slack


class Observer:
    """Samples a run's process tree and folders.

    Args:
        folders: Whose bytes are held against the budget.
        budget_bytes: The run's --max-disk.
    """

    def __init__(self, folders: tuple[Path, ...], budget_bytes: int) -> None:
        self._folders, self._budget_bytes = folders, budget_bytes
        self.tree_memory = Series("memory of all processes")
        self.supervisor_memory = Series("memory of the supervisor")
        self.descriptors = Series("descriptors of all processes")
        self.disk = Series("disk")
        self.processes = Series("processes")
        self._names_before = _shared_memory()
        self.seen: dict[int, float] = {}  # every process of the run: pid → its start

    def remember(self, supervisor: psutil.Process) -> None:
        """Note which processes there are: all of them must be gone after the run."""
        for process in children(supervisor):
            with contextlib.suppress(psutil.Error):
                self.seen[process.pid] = process.create_time()

    def sample(self, supervisor: psutil.Process) -> None:
        """Measure once; a process that ends meanwhile counts for nothing."""
        self.disk.values.append(sum(folder_bytes(folder) for folder in self._folders))
        memory = descriptors = count = 0
        for process in (supervisor, *children(supervisor)):
            try:
                own = _memory_bytes(process)
                descriptors += process.num_fds()
                self.seen[process.pid] = process.create_time()
            except (psutil.Error, OSError):
                continue
            count += 1
            memory += own
            if process == supervisor:
                self.supervisor_memory.values.append(own)
        self.tree_memory.values.append(memory)
        self.descriptors.values.append(descriptors)
        self.processes.values.append(count)

    def problems(self) -> list[str]:
        """What was not flat, and whether the budget held."""
        found = []
        for series in (self.tree_memory, self.supervisor_memory):
            if series.grew(_MEMORY_SLACK, _MEMORY_SLACK_BYTES):
                found.append(f"{series.name} grew: {series.summary()}")
        if self.descriptors.grew(1.0, _DESCRIPTOR_SLACK):
            found.append(f"{self.descriptors.name} grew: {self.descriptors.summary()}")
        peak = max(self.disk.values, default=0)
        if peak > self._budget_bytes:
            found.append(f"{peak:.0f} bytes on disk, {self._budget_bytes} allowed")
        return found

    def left_behind(self, timeout_s: float = 5.0) -> list[str]:
        """Processes and shared memory that a run has left; waits for what is just ending."""
        deadline = time.monotonic() + timeout_s
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = [f"process {pid} is still alive" for pid in alive]
        ours = {str(pid) for pid in self.seen}
        for name in sorted(_shared_memory() - self._names_before):
            if name.startswith("fw-") or ours & set(re.findall(r"\d+", name)):
                found.append(f"/dev/shm/{name} is left")
        return found

    def _alive(self) -> list[int]:
        alive = []
        for pid, started in self.seen.items():
            try:
                process = psutil.Process(pid)
                running = process.status() != psutil.STATUS_ZOMBIE
                if process.create_time() == started and running:
                    alive.append(pid)
            except psutil.Error:
                continue
        return alive


def children(process: psutil.Process) -> list[psutil.Process]:
    """All living descendants."""
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def folder_bytes(folder: Path | str) -> int:
    """Bytes of all files in a folder, token files of `tokenize` apart: they are its result."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        total += folder_bytes(entry.path)
                    elif not entry.name.startswith(("tokens_", "writer.json")):
                        total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue
    except FileNotFoundError:
        pass
    return total


def _memory_bytes(process: psutil.Process) -> int:
    """Memory of one process; pages shared with others count in part where the system says so."""
    info = process.memory_full_info()
    return int(getattr(info, "pss", 0) or info.uss)


def _shared_memory() -> set[str]:
    """All names in /dev/shm, other programs' too; none where there is no such folder."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
