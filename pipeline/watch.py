"""When a process is given up: silent at its start, silent with work to do, or too large.

Runs in: supervisor. The rules stand here (those for workers with work in Scheduler.on_time); the
generation kills, and the death is then handled like any other: it counts against the block or
shard that was being worked on.

Silence is judged by messages that come from the work itself, never from a timer. Memory is
watched rather than limited by the kernel: RLIMIT_AS counts mapped segments and reserved address
space, macOS enforces neither it nor RLIMIT_DATA, and under either an allocation fails somewhere
inside a C library instead of in a place that can say so.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from pipeline.config import Stream
from pipeline.spawn import Child

_PAUSE_S = 2.0  # an event loop that was away for longer was not running
_MIN_MEMORY_BYTES = 1 << 30


class RunningTime:
    """A clock of the time in which this process ran, to be read at least every second.

    A supervisor that was stopped (SIGSTOP, a debugger, a frozen container) comes back to workers
    that have been silent as long as it was: its own absence must not be held against them.
    """

    def __init__(self) -> None:
        self._seen = time.monotonic()
        self._away = 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        if now - self._seen > _PAUSE_S:
            self._away += now - self._seen
        self._seen = now
        return now - self._away


def memory_limit_bytes(worker_memory_gb: float | None) -> int:
    """What one worker may hold: as configured, or a quarter of this machine's or container's
    memory, and 1 GiB at least."""
    if worker_memory_gb is not None:
        return int(worker_memory_gb * 1e9)
    total = psutil.virtual_memory().total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        try:
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
        except (OSError, ValueError):  # there is none, or it says max
            continue
    return max(_MIN_MEMORY_BYTES, total // 4)


def memory_bytes(pid: int) -> int:
    """Memory that is this process's alone; where the system does not tell, shared pages too."""
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(info.rss) - int(getattr(info, "shared", 0))


class Watch:
    """The rules over one generation's processes.

    Args:
        stream: Its hang_s, consumer_hang_s and worker_memory_gb.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._memory_bytes = memory_limit_bytes(stream.worker_memory_gb)

    def silent(self, child: Child, now: float) -> str | None:
        """Why a consumer that has not said Hello, or has what it needs, is to be killed; None if
        it is not."""
        silent_s = now - child.heard
        if not child.ready:
            limit_s, what = self._stream.hang_s, "since its start (hang_s)"
        else:
            limit_s, what = self._stream.consumer_hang_s, "with work to do (consumer_hang_s)"
        return f"silent for {silent_s:.0f} s {what}" if silent_s > limit_s else None

    def too_large(self, child: Child) -> str | None:
        """Why a worker is to be killed for its memory; the trainer may use what there is."""
        if child.role == "trainer":
            return None
        held = memory_bytes(child.pid)
        if held <= self._memory_bytes:
            return None
        return (
            f"holds {held / 1e9:.2f} GB of memory, more than {self._memory_bytes / 1e9:.2f} GB "
            "(worker_memory_gb)"
        )
