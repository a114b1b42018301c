"""What a run shows of itself: one frozen picture, four times a second.

Runs in: supervisor. Pure.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class StageStatus(msgspec.Struct, frozen=True):
    """One stage of the pipeline."""

    name: str
    workers: int
    busy: float  # share of its workers' time spent on work, 0 to 1
    rate: float  # in unit, over the last seconds
    unit: str
    queue: int  # what waits in front of or inside the stage
    capacity: int  # the most that can wait
    restarts: int


class DiskStatus(msgspec.Struct, frozen=True):
    """The byte budget; used_bytes counts fetches under way in full."""

    budget_bytes: int
    used_bytes: int
    cached_bytes: int
    reserved_bytes: int
    checkpoint_bytes: int
    log_bytes: int
    peak_bytes: int
    evicted_bytes: int
    evicted_shards: int
    cached_shards: int


class Status(msgspec.Struct, frozen=True):
    """Everything that a view shows."""

    name: str
    kind: str  # train or tokenize
    phase: str  # starting or running
    elapsed_s: float
    step: int
    total_steps: int | None
    metrics: dict[str, Any]  # of the last update
    stages: tuple[StageStatus, ...]
    ring_fill: float  # 0 to 1
    disk: DiskStatus
    bad_records: int
    restarts: int
    limiting: str  # what limits now, in words


class View(Protocol):
    """Where the user looks."""

    def update(self, status: Status) -> None:
        """Show the newest status."""
        ...

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Something has happened."""
        ...

    def close(self) -> None:
        """Leave the screen clean."""
        ...
