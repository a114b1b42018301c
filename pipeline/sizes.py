"""How many workers of each kind, from the number of processors.

Runs in: supervisor. split is pure.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from pipeline.config import Stream

# A core tokenizes about this many bytes in the time in which another decompresses one (measured:
# benchmarks/RESULTS.md); fetching takes little processor time and much waiting.
_TOKENIZERS_PER_DECOMPRESSOR = 2
_TOKENIZERS_PER_FETCHER = 2


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


def split(cpus: int, kind: str, stream: Stream) -> StageSizes:
    """Sizes of all stages.

    Args:
        cpus: Processors that may be used.
        kind: train (one processor is left to the trainer) or tokenize.
        stream: Its workers, fetchers and decompressors, where given, are taken as they are.
    """
    if stream.workers == "auto":
        left = cpus - 1 if kind == "train" else cpus
        ratio = _TOKENIZERS_PER_DECOMPRESSOR
        tokenizers = max(1, left * ratio // (ratio + 1))
        why = f"{cpus} CPUs" + (", one for the trainer" if kind == "train" and cpus > 1 else "")
    else:
        tokenizers, why = stream.workers, f"{stream.workers} tokenizers asked for"
    return StageSizes(
        fetchers=stream.fetchers or max(1, -(-tokenizers // _TOKENIZERS_PER_FETCHER)),
        decompressors=stream.decompressors
        or max(1, -(-tokenizers // _TOKENIZERS_PER_DECOMPRESSOR)),
        tokenizers=tokenizers,
        why=why,
    )
