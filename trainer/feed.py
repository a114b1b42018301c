"""Batches out of the ring: which window comes next, and when a slot may go.

Runs in: trainer. Imports no mlx: a window is a numpy view, and whoever takes it uploads it.

Window k of a lane is its tokens [k·T, k·T + T], so where the lanes stand says it all: whose window
comes next is pipeline/turns.py's to say.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import xxhash

from pipeline.channel import Channel
from pipeline.messages import (
    CheckpointGranted,
    CheckpointWanted,
    Cursor,
    CursorIs,
    CursorWanted,
    LaneEnded,
    Message,
    SlotPublished,
    SlotReleased,
    Stop,
)
from pipeline.turns import Group, Turns, one_group
from shm import ring

Answer = TypeVar("Answer", CursorIs, CheckpointGranted)


_WAIT_S = 60.0  # between looks at the deadline


class StopWanted(Exception):  # noqa: N818 - it is no error
    """The supervisor asked to stop, or the time was up, while the feed waited for data."""


class Feed:
    """The trainer's side of the ring.

    Args:
        channel: To the supervisor.
        tokens: The ring, mapped read-only.
        positions: Where every lane stands, multiples of seq_len.
        seq_len: T.
        groups: The data sets that the lanes hold; none: they all hold one.
    """

    def __init__(
        self,
        channel: Channel,
        tokens: ring.Ring,
        positions: tuple[int, ...],
        seq_len: int,
        groups: tuple[Group, ...] = (),
    ) -> None:
        self._channel, self._ring, self._T = channel, tokens, seq_len
        self.turns = Turns(groups or one_group(len(positions)), seq_len)
        self.positions = list(positions)
        self._valid = list(positions)
        self._ends: list[int | None] = [None] * len(positions)
        self._answers: deque[CursorIs | CheckpointGranted] = deque()
        self._requests = 0
        self._digest = xxhash.xxh3_64()
        self.stop: Stop | None = None
        self.deadline_s = float("inf")  # of time.monotonic(): training ends then
        self.wait_s = 0.0  # waited for data since the last look

    # ── windows ─────────────────────────────────────────────────────────────────────────────

    def take(self, count: int, upload: Callable[[np.ndarray], None]) -> bool:
        """Hand the next windows to upload, in order.

        Args:
            count: Number of windows.
            upload: Called with each window, shape (T + 1,), a view of the ring that is valid
                during the call only.

        Returns:
            False if the stream ended before: what was handed over is no whole batch.

        Raises:
            StopWanted: Stop came while waiting for data.
        """
        for _ in range(count):
            lane = self._next_lane()
            if lane is None:
                return False
            position, C = self.positions[lane], self._ring.shape.slot_tokens
            window = self._ring.view(lane, position, self._T + 1)
            self._digest.update(memoryview(window).cast("B"))
            upload(window)
            self.positions[lane] = position + self._T
            if self.positions[lane] // C > position // C:
                self._channel.send(SlotReleased(lane, position // C))
        return True

    def _next_lane(self) -> int | None:
        """The lane whose turn it is, once its window is there; None at the end of the stream."""
        while True:
            lane = self.turns.next_lane(self.positions, self._ends)
            if lane is None:
                return None
            if self.positions[lane] + self._T + 1 <= self._valid[lane]:
                return lane
            if self.stop is not None:
                raise StopWanted
            begin = time.monotonic()
            if begin >= self.deadline_s:
                raise StopWanted
            wait_s = min(self.deadline_s - begin, _WAIT_S)
            message = self._channel.receive(wait_s)
            if message is not None:
                self._handle(message)
            self.wait_s += time.monotonic() - begin

    def batch_hash(self) -> str:
        """xxh3_64 of all windows since the last call, in hexadecimal."""
        digest = self._digest.hexdigest()
        self._digest.reset()
        return digest

    def mix(self) -> dict[str, float]:
        """The part of all windows that each data set has had since the run's beginning; empty
        where there is but one."""
        return self.turns.shares(self.positions) if len(self.turns.groups) > 1 else {}

    def unused_tokens(self) -> int:
        """Tokens at the ends of the lanes that make no whole window."""
        return sum(
            max(0, end - position - 1)
            for end, position in zip(self._ends, self.positions, strict=True)
            if end is not None
        )

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def poll(self) -> None:
        """Take messages that have arrived, without waiting."""
        while (message := self._channel.receive(0)) is not None:
            self._handle(message)

    def cursor(self, positions: list[int]) -> Cursor:
        """The supervisor's cursor for these lane positions."""
        return self._cursor(positions).cursor

    def _cursor(self, positions: list[int]) -> CursorIs:
        self._requests += 1
        self._channel.send(CursorWanted(self._requests, tuple(positions)))
        return self._answer(CursorIs)

    def provenance(self, begin: list[int], end: list[int]) -> list[str]:
        """Where the windows between these lane positions come from, a line a lane: shard, block
        and token of the first. None of them may lie before the last cursor."""
        answer = self._cursor(begin)
        return [
            f"lane {lane}, windows {start // self._T} to {stop // self._T - 1}: "
            f"{shard}, block {at.block}, token {at.token}"
            for lane, (start, stop, shard, at) in enumerate(
                zip(begin, end, answer.shards, answer.cursor.lanes, strict=True)
            )
            if start != stop
        ]

    def reserve(self, size_bytes: int) -> None:
        """Wait until a checkpoint's bytes are set aside."""
        self._requests += 1
        self._channel.send(CheckpointWanted(self._requests, size_bytes))
        self._answer(CheckpointGranted)

    def _answer(self, kind: type[Answer]) -> Answer:
        while not self._answers:
            self._handle(self._channel.receive())
        answer = self._answers.popleft()
        if not isinstance(answer, kind) or answer.request != self._requests:
            raise TypeError(f"the trainer got {answer!r} instead of {kind.__name__}")
        return answer

    def _handle(self, message: Message | None) -> None:
        match message:
            case SlotPublished(lane=lane, end=end):
                self._valid[lane] = end
            case LaneEnded(lane=lane, end=end):
                self._ends[lane] = end
            case CursorIs() | CheckpointGranted():
                self._answers.append(message)
            case Stop():
                self.stop = message
            case _:
                raise TypeError(f"the trainer got {message!r}")
