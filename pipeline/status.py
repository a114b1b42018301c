"""What a run shows of itself: one frozen picture, four times a second.

Runs in: supervisor. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    verdict: str  # what limits now, in words: pipeline/verdict.py
    first_step: int = 0  # updates that were done before the start
    losses: tuple[float, ...] = ()  # of all updates since the start, at most Curve.POINTS means
    notes: tuple[str, ...] = ()  # the newest events that a person wants to see
    url: str | None = None  # of the live page, if there is one
    step_s: float | None = None  # seconds an update takes: mean of the newest ones


# Events that a person wants to see; log.txt has all.
SHOWN = {
    "workers_chosen", "consumer_ready", "resuming", "shard_evicted", "checkpoint_written",
    "worker_died", "worker_hangs", "trainer_died", "writer_died", "worker_killed", "bad_record",
    "shard_skipped", "block_skipped", "disk_full", "stopping", "stream_ended", "worker_stderr",
    "cached_shard_damaged", "fetch_tried_again", "worker_failed", "listing_shards",
    "listing_tried_again", "checkpoint_waits_for_disk", "serving_status", "status_server_ended",
    "ranks_started_again", "ranks_differed", "rank_waits_for_data",
}  # fmt: skip
_NOTE_LENGTH = 160


def is_shown(level: str, event: str) -> bool:
    """Whether a person wants to see an event."""
    return event in SHOWN or level == "error"


def note(event: str, fields: Mapping[str, Any]) -> str:
    """An event in one line."""
    said = "  ".join(f"{key} {value}" for key, value in fields.items())
    return f"{event.replace('_', ' ')}: {said}"[:_NOTE_LENGTH]


class Curve:
    """A growing line of numbers in bounded memory: the means of stretches of equal length.

    When there are more than POINTS of them, neighbours are put together and the stretches are
    twice as long; the last one may be shorter.
    """

    POINTS = 120

    def __init__(self) -> None:
        self._means: list[float] = []
        self._per = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """The next number; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._per:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) > self.POINTS - 1:  # one is kept for the stretch that has begun
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._per *= 2

    def points(self) -> tuple[float, ...]:
        """The means so far."""
        begun = (self._sum / self._count,) if self._count else ()
        return (*self._means, *begun)


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
