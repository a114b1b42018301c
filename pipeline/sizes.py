"""How many workers of each kind, from the number of processors and what the work costs.

Runs in: supervisor. split is pure.
"""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

import msgspec

from pipeline.config import Stream
from pipeline.costs import Costs

_MAX_FETCHERS = 8  # they wait for the network more than they work


class StageSizes(msgspec.Struct, frozen=True):
    """Number of processes of each stage, and why."""

    fetchers: int
    decompressors: int
    tokenizers: int
    why: str


def usable_cpus() -> int:
    """Processors that this process may use: affinity and cgroup limits respected."""
    pinned = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cpus = len(pinned(0)) if pinned else os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, min(cpus, quota) if quota else cpus)


def _cgroup_cpus() -> int | None:
    """Whole processors that the cgroup (v2, then v1) allows, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            folder = Path("/sys/fs/cgroup/cpu")
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    return max(1, int(quota) // int(period))


def split(cpus: int, kind: str, stream: Stream, costs: Costs) -> StageSizes:
    """Sizes of all stages.

    With read seconds and encode seconds a megabyte, n processors are all busy if each stage has
    its share of n processes; a share is rounded up, since half a process is none.

    Args:
        cpus: Processors that may be used.
        kind: train (one processor is left to the trainer) or tokenize.
        stream: Its workers, fetchers and decompressors, where given, are taken as they are.
        costs: Of these shards on this machine.
    """
    left = max(1, cpus - 1) if kind == "train" else cpus
    read, encode = costs.read_s, costs.encode_s
    said = f"1 MB of text costs {1e3 * read:.1f} ms to read and {1e3 * encode:.1f} ms to encode"
    said += f", by whole runs on {costs.rest.measured_on}" if costs.rest else ""
    if stream.workers == "auto":
        tokenizers = _up(left * encode / (read + encode))
        decompressors = _up(left * read / (read + encode))
        kept = ", one for the trainer" if left < cpus else ""
        why = f"{cpus} CPUs{kept}; {said}"
    else:
        tokenizers = stream.workers
        decompressors = min(_up(tokenizers * read / encode), cpus)
        why = f"{tokenizers} tokenizers asked for; {said}"
    return StageSizes(
        fetchers=stream.fetchers or min(_up(tokenizers / 2), _MAX_FETCHERS),
        decompressors=stream.decompressors or decompressors,
        tokenizers=tokenizers,
        why=why,
    )


def _up(share: float) -> int:
    """Whole processes for a share of them; rounding errors make no process."""
    return max(1, ceil(share - 1e-9))
