"""Cores that do nothing, of those that this run may use.

Runs in: supervisor. Affinity and the cgroup's quota (version 2) are respected.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from pipeline.sizes import usable_cpus

_CGROUP = Path("/sys/fs/cgroup/cpu.stat")
_SHORTEST_S = 0.5  # the system counts in hundredths of a second


class Cores:
    """Reads the system's counters; the answer is the mean since the last one."""

    def __init__(self) -> None:
        self.usable = usable_cpus()
        self._last: tuple[float, float, float | None] | None = None
        self._idle: float | None = None

    def idle(self) -> float | None:
        """Idle cores since the last answer, 0 to usable; None until there was one."""
        now, idle_s, used_s = time.monotonic(), _idle_s(), _cgroup_used_s()
        if self._last is None:
            self._last = now, idle_s, used_s
        elif (span := now - self._last[0]) >= _SHORTEST_S:
            idle = (idle_s - self._last[1]) / span
            if used_s is not None and self._last[2] is not None:
                idle = min(idle, self.usable - (used_s - self._last[2]) / span)
            self._idle = min(float(self.usable), max(0.0, idle))
            self._last = now, idle_s, used_s
        return self._idle


def _idle_s() -> float:
    """Seconds that the processors which this process may use have been idle."""
    times = psutil.cpu_times(percpu=True)
    pinned = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    mine = [n for n in pinned(0) if n < len(times)] if pinned else range(len(times))
    return float(sum(times[n].idle + getattr(times[n], "iowait", 0.0) for n in mine))


def _cgroup_used_s() -> float | None:
    """Seconds of CPU that everything in this cgroup has used; None where it has no such count."""
    try:
        fields = dict(line.split() for line in _CGROUP.read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6
    except (OSError, KeyError, ValueError):
        return None
