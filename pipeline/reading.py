"""A model of the consumer: what it reads next, and which slot that frees.

Runs in: the forecast of `plan`, and the tests' simulation. Pure: it knows positions, not tokens.
The real readers are trainer/feed.py and pipeline/workers/writer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from pipeline.messages import LaneEnded, SlotPublished, SlotReleased

NOT_YET = -1  # the lane whose turn it is has nothing to read


class Read(NamedTuple):
    """One piece: tokens begin to end of a lane, and the slot that nobody needs any more."""

    lane: int
    begin: int
    end: int
    frees: SlotReleased | None


class Reading:
    """Where a reader stands in every lane.

    A trainer reads windows of T + 1 tokens, of the data set whose turn it is and there of the lane
    that is furthest behind; a writer reads T tokens of each lane in turn up to the lane's end.

    Args:
        positions: Where it begins.
        seq_len: T.
        slot_tokens: C.
        writer: Whether it reads every token, not windows.
        due: The lanes of the data set whose turn it is, given where the reader stands.
    """

    def __init__(
        self,
        positions: Sequence[int],
        seq_len: int,
        slot_tokens: int,
        *,
        writer: bool,
        due: Callable[[Sequence[int]], Iterable[int]],
    ) -> None:
        self.T, self.C, self.writer = seq_len, slot_tokens, writer
        self.due, self.positions = due, list(positions)
        self.valid = list(positions)  # tokens before this may be read
        self.ends: list[int | None] = [None] * len(positions)

    def copy(self) -> Reading:
        """Another reader that stands there."""
        other = Reading(self.positions, self.T, self.C, writer=self.writer, due=self.due)
        other.valid, other.ends = list(self.valid), list(self.ends)
        return other

    def take(self, message: SlotPublished | LaneEnded) -> None:
        """What the supervisor says of the ring."""
        lane, end = message.lane, message.end
        if isinstance(message, LaneEnded):
            self.ends[lane] = max(end, self.positions[lane])
        else:  # the halo is the next slot's first token: a writer reads it there
            self.valid[lane] = min(end, (message.slot + 1) * self.C) if self.writer else end

    def next_lane(self) -> int | None:
        """The lane to read from now; None at the end, NOT_YET if its tokens are not there."""
        lane = self._wanted()
        if lane is None:
            return None
        return lane if self.positions[lane] + self._need <= self.valid[lane] else NOT_YET

    @property
    def _need(self) -> int:
        return 1 if self.writer else self.T + 1

    def _wanted(self) -> int | None:
        """The lane that the reader needs next, whether its tokens are there or not."""
        best = None
        for lane in self.due(self.positions):
            position, end = self.positions[lane], self.ends[lane]
            turn = position // self.T
            if (end is None or position + self._need <= end) and (best is None or turn < best[0]):
                best = turn, lane
        return None if best is None else best[1]

    def read(self, lane: int) -> Read:
        """Read a lane's next piece, which must be there."""
        begin = self.positions[lane]
        end = self.positions[lane] = self._end_of_read(lane, begin)
        slot = begin // self.C
        freed = end // self.C > slot or (self.writer and end == self.ends[lane])
        return Read(lane, begin, end, SlotReleased(lane, slot) if freed else None)

    def _end_of_read(self, lane: int, begin: int) -> int:
        if not self.writer:
            return begin + self.T
        turn_end, slot_end = (begin // self.T + 1) * self.T, (begin // self.C + 1) * self.C
        return min(turn_end, slot_end, self.valid[lane])
