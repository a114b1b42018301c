"""The supervisor's side of the consumer: what the trainer or writer asks for, and is told.

Runs in: supervisor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from pipeline.errors import BudgetError, DiskError
from pipeline.messages import (
    BatchTaken,
    CheckpointFailed,
    CheckpointGranted,
    CheckpointWanted,
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    Cursor,
    CursorIs,
    CursorWanted,
    Hello,
    Message,
    StepDone,
    Stop,
    Working,
)
from pipeline.scheduler import Scheduler
from pipeline.state import Command

_RETRY_S = 5.0  # between attempts to write a checkpoint to a full disk


class DiskFullError(DiskError):
    """A checkpoint could not be written for as long as the run may wait: nothing can be saved."""


class Told(Protocol):
    """Whom this tells of what happens: the generation's hooks."""

    @property
    def event(self) -> Callable[..., None]: ...

    @property
    def step(self) -> Callable[[dict[str, Any]], None]: ...

    @property
    def checkpoint(self) -> Callable[[CheckpointWritten], None]: ...


class Consuming:
    """One consumer's requests, from its start to ConsumerDone.

    Args:
        scheduler: Of this generation.
        told: Hooks.
        base: The cursor that this generation began with.
        checkpoints_kept: Checkpoints on disk beside the one being written.
        disk_wait_s: How long a checkpoint that meets a full disk is tried again.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        told: Told,
        base: Cursor,
        checkpoints_kept: int,
        disk_wait_s: float,
    ) -> None:
        self.scheduler, self.told, self.base = scheduler, told, base
        self.checkpoints_kept, self.disk_wait_s = checkpoints_kept, disk_wait_s
        self.facts: dict[str, Any] = {}  # empty until it is ready
        self.done: ConsumerDone | None = None
        self.stopping_since: float | None = None
        self.writing_bytes = 0  # of the checkpoint that is being written
        self._full_since: float | None = None  # the disk
        self._withheld: tuple[float, CheckpointWanted] | None = None  # granted when it is due

    def take(
        self, message: Message, send: Callable[[Message], None], now: float
    ) -> list[Command] | None:
        """Handle a message; None if it is one for the scheduler.

        Raises:
            BudgetError: a checkpoint is larger than it said.
            DiskFullError: the disk has been full for too long.
        """
        match message:
            case Hello() | Working() | BatchTaken():
                pass
            case ConsumerReady(checkpoint_bytes=size, facts=facts):
                self.facts = facts
                self.told.event("info", "consumer_ready", **facts)
                total = size * (self.checkpoints_kept + 1)
                return self.scheduler.on_checkpoint_bytes(total)
            case CursorWanted(request=request, positions=positions):
                cursor = self.scheduler.cursor(positions, self.base)
                send(CursorIs(request, cursor, self.scheduler.shards_at(cursor)))
            case CheckpointWanted():
                self._check_size(message.size_bytes)
                if self._full_since is None:
                    self._grant(message, send)
                else:
                    self._withheld = now + _RETRY_S, message
            case CheckpointFailed(what=what):
                return self._disk_is_full(what, now)
            case CheckpointWritten():
                self.writing_bytes, self._full_since = 0, None
                self.told.checkpoint(message)
            case StepDone(metrics=metrics):
                self.told.step(metrics)
            case ConsumerDone():
                self.done = message
            case _:
                return None
        return []

    def stop(self, reason: str, send: Callable[[Message], None], now: float) -> None:
        """Ask the consumer to save and end; asked once, it is not asked again."""
        if self.stopping_since is None:
            self.stopping_since = now
            send(Stop(reason))

    def on_time(self, send: Callable[[Message], None], now: float) -> None:
        """Grant what was withheld and is due."""
        if self._withheld is not None and self._withheld[0] <= now:
            wanted, self._withheld = self._withheld[1], None
            self._grant(wanted, send)

    def has_work(self) -> bool:
        """Whether the consumer can go on without anything from us: then its silence means
        something."""
        if self._withheld is not None:
            return False
        if not self.facts or self.stopping_since is not None:
            return True  # it sets itself up, or saves
        return self.scheduler.limiting() == "consumer"

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────

    def _check_size(self, size_bytes: int) -> None:
        reserved = self.scheduler.state.checkpoint_bytes or 0
        if size_bytes * (self.checkpoints_kept + 1) > reserved:
            raise BudgetError(
                f"a checkpoint of {size_bytes} bytes is larger than what was set aside "
                f"({reserved} bytes for {self.checkpoints_kept + 1})",
                "this is a bug: please report it",
            )

    def _grant(self, wanted: CheckpointWanted, send: Callable[[Message], None]) -> None:
        self.writing_bytes = wanted.size_bytes
        send(CheckpointGranted(wanted.request))

    def _disk_is_full(self, what: str, now: float) -> list[Command]:
        """Make room and let the consumer try again, or give up."""
        self.writing_bytes = 0
        if self._full_since is None:
            self._full_since = now
        waited_s = now - self._full_since
        if waited_s >= self.disk_wait_s:
            raise DiskFullError(
                f"a checkpoint could not be written for {waited_s:.0f} s: {what}",
                "free some space: the same command goes on from the checkpoint before it "
                "(data.stream.disk_wait_s is how long a run waits)",
            )
        self.told.event(
            "warning",
            "checkpoint_waits_for_disk",
            what=what,
            remedy=f"free some space: fetching pauses, the next attempt is in {_RETRY_S:.0f} s, "
            f"the run ends in {self.disk_wait_s - waited_s:.0f} s",
        )
        return self.scheduler.on_disk_full(now)
