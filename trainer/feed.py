"""Batches out of the ring: which window comes next, and when a slot may go.

Runs in: trainer. Imports no mlx: a window is a numpy view, and whoever takes it uploads it.

Window k of a lane is its tokens [k·T, k·T + T], so where the lanes stand says it all: whose window
comes next is pipeline/turns.py's to say.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import numpy as np

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
from pipeline.turns import Group, Turns, batch_hash, one_group, row_digest
from shm import ring

Answer = TypeVar("Answer", CursorIs, CheckpointGranted)
Row = TypeVar("Row")

_WAIT_S = 60.0  # between looks at the deadline


class StopWanted(Exception):  # noqa: N818 - it is no error
    """The supervisor asked to stop, or the time was up, while the feed waited for data."""


class _Said(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others before an update.

    wait_s: it has waited for data. ends: of its lanes that have ended, by number. digests: of its
    rows, in the order of their turns.
    """

    stop: bool
    wait_s: float
    ends: dict[int, int]
    digests: bytes


class Feed:
    """The trainer's side of the ring.

    Args:
        channel: To the supervisor.
        tokens: The ring, mapped read-only: the lanes of this rank.
        positions: Where every lane of the stream stands, multiples of seq_len.
        seq_len: T.
        groups: The data sets that the lanes hold; none: they all hold one.
        lanes: Numbers of this rank's lanes; None: all.
        exchange: Gives the other ranks our message and returns all ranks', in their order.
    """

    def __init__(
        self,
        channel: Channel,
        tokens: ring.Ring,
        positions: tuple[int, ...],
        seq_len: int,
        groups: tuple[Group, ...] = (),
        lanes: Sequence[int] | None = None,
        exchange: Callable[[bytes], list[bytes]] = lambda mine: [mine],
    ) -> None:
        self._channel, self._ring, self._T = channel, tokens, seq_len
        self.turns = Turns(groups or one_group(len(positions)), seq_len)
        self.positions = list(positions)
        owned = range(len(positions)) if lanes is None else lanes
        self._lanes = {lane: number for number, lane in enumerate(owned)}  # the ring's numbers
        self._exchange = exchange
        self._valid = [positions[lane] for lane in owned]
        self._ends: list[int | None] = [None] * len(owned)  # of our lanes
        self._agreed: list[int | None] = [None] * len(positions)  # of all, as all ranks know it
        self._answers: deque[CursorIs | CheckpointGranted] = deque()
        self._requests = 0
        self.stop: Stop | None = None
        self.deadline_s = float("inf")  # of time.monotonic(): training ends then
        self.wait_s = 0.0  # waited for data since the last look
        self.sync_s = 0.0  # the same for the other ranks
        self.waits_s: list[float] = []  # every rank's, before the newest update
        self.batch_hash = ""  # SHA-256 of the newest update's rows, all ranks'

    # ── windows ─────────────────────────────────────────────────────────────────────────────

    def take(self, count: int, upload: Callable[[np.ndarray], Row]) -> list[Row] | None:
        """The next windows of the stream, as far as they are ours.

        All ranks take them together: each waits for its own, then they tell one another what they
        have, and where a lane has ended. A lane that has ended changes whose windows come next,
        for all alike.

        Args:
            count: Number of windows, of all ranks together.
            upload: Called with each of our windows, shape (T + 1,), a view of the ring that is
                valid during the call only; returns what is kept of it.

        Returns:
            What was kept of our windows, in the order of their turns; None if the stream ends
            before there are enough for all: nothing was taken.

        Raises:
            StopWanted: this rank or another is to stop: nothing was taken.
        """
        begin, waited = list(self.positions), self.wait_s
        taken: dict[int, list[tuple[bytes, Row]]] = {lane: [] for lane in self._lanes}
        order = self._order(begin, count)
        while True:
            stop = self.stop is not None or time.monotonic() >= self.deadline_s
            try:
                if not stop:
                    self._collect(order or [], begin, taken, upload)
            except StopWanted:
                stop = True
            said = self._agree(stop, self.wait_s - waited, self._digests(order or [], taken))
            known, order = order, self._order(begin, count)
            if order == known:
                break
        if order is None:
            return None
        self._hash(order, said)
        for lane in order:
            self.positions[lane] += self._T
        queues = {lane: deque(ones) for lane, ones in taken.items()}
        return [queues[lane].popleft()[1] for lane in order if lane in queues]

    def _order(self, begin: list[int], count: int) -> list[int] | None:
        """The lanes of the next windows, by what all ranks know; None: there are not enough."""
        positions, order = list(begin), []
        for _ in range(count):
            lane = self.turns.next_lane(positions, self._agreed)
            if lane is None:
                return None
            order.append(lane)
            positions[lane] += self._T
        return order

    def _collect(
        self,
        order: list[int],
        begin: list[int],
        taken: dict[int, list[tuple[bytes, Row]]],
        upload: Callable[[np.ndarray], Row],
    ) -> None:
        """Take what is still missing of our windows, or come back at the end of a lane."""
        wanted = Counter(order)
        for lane in order:
            number = self._lanes.get(lane)
            if number is None or len(taken[lane]) >= wanted[lane]:
                continue
            position, C = begin[lane] + len(taken[lane]) * self._T, self._ring.shape.slot_tokens
            if not self._wait_for(number, position):
                return
            window = self._ring.view(number, position, self._T + 1)
            taken[lane].append((row_digest(window), upload(window)))
            if (position + self._T) // C > position // C:
                self._channel.send(SlotReleased(number, position // C))

    def _wait_for(self, number: int, position: int) -> bool:
        """Until one of our lanes has a window there; False: it ends before. Raises: StopWanted."""
        while self._valid[number] < position + self._T + 1:
            end = self._ends[number]
            if end is not None and position + self._T + 1 > end:
                return False
            begin = time.monotonic()
            if self.stop is not None or begin >= self.deadline_s:
                raise StopWanted
            message = self._channel.receive(min(self.deadline_s - begin, _WAIT_S))
            if message is not None:
                self._handle(message)
            self.wait_s += time.monotonic() - begin
        return True

    def _digests(self, order: list[int], taken: dict[int, list[tuple[bytes, Row]]]) -> bytes:
        """Of our windows, in the order of their turns, as far as they are there."""
        queues = {lane: deque(ones) for lane, ones in taken.items()}
        return b"".join(queues[lane].popleft()[0] for lane in order if queues.get(lane))

    def _agree(self, stop: bool, wait_s: float, digests: bytes) -> list[_Said]:
        """Tell the other ranks how we stand, and take over what they know.

        Raises:
            StopWanted: one of them is to stop.
        """
        numbers = {number: lane for lane, number in self._lanes.items()}
        ends = {numbers[n]: end for n, end in enumerate(self._ends) if end is not None}
        mine = msgspec.msgpack.encode(_Said(stop, wait_s, ends, digests))
        begin = time.monotonic()
        said = [msgspec.msgpack.decode(one, type=_Said) for one in self._exchange(mine)]
        self.sync_s += time.monotonic() - begin
        if any(one.stop for one in said):
            raise StopWanted
        self.waits_s = [one.wait_s for one in said]
        for one in said:
            for lane, end in one.ends.items():
                self._agreed[lane] = end
        return said

    def _hash(self, order: list[int], said: list[_Said]) -> None:
        queues = [deque(one.digests[at : at + 32] for at in range(0, len(one.digests), 32))
                  for one in said]  # fmt: skip
        self.batch_hash = batch_hash(queues[lane % len(said)].popleft() for lane in order)

    def mix(self) -> dict[str, float]:
        """The part of all windows that each data set has had since the run's beginning; empty
        where there is but one."""
        return self.turns.shares(self.positions) if len(self.turns.groups) > 1 else {}

    def unused_tokens(self) -> int:
        """Tokens at the ends of the lanes that make no whole window."""
        return sum(
            max(0, end - position - 1)
            for end, position in zip(self._agreed, self.positions, strict=True)
            if end is not None
        )

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def poll(self) -> None:
        """Take messages that have arrived, without waiting."""
        while (message := self._channel.receive(0)) is not None:
            self._handle(message)

    def cursor(self, positions: list[int]) -> Cursor:
        """The supervisor's cursor for our lanes at these positions (of all lanes)."""
        return self._cursor(positions).cursor

    def _cursor(self, positions: list[int]) -> CursorIs:
        self._requests += 1
        ours = tuple(positions[lane] for lane in self._lanes)
        self._channel.send(CursorWanted(self._requests, ours))
        return self._answer(CursorIs)

    def provenance(self, begin: list[int], end: list[int]) -> list[str]:
        """Where our windows between these positions of all lanes come from, a line a lane: shard,
        block and token of the first. None of them may lie before the last cursor."""
        answer = self._cursor(begin)
        places = zip(self._lanes, answer.shards, answer.cursor.lanes, strict=True)
        return [
            f"lane {lane}, windows {begin[lane] // self._T} to {end[lane] // self._T - 1}: "
            f"{shard}, block {at.block}, token {at.token}"
            for lane, shard, at in places
            if begin[lane] != end[lane]
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
