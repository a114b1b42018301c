"""Whose window comes next: the one rule by which lanes become a sequence of batches.

Runs in: trainer (its feed), supervisor (how far the reader can have come) and `where`. Pure.

Lanes belong to groups, one group a data set. The next window belongs to the group that is
furthest behind its weight, and there to the lane that has the lowest position. Both can be told
from where the lanes stand, so a cursor needs nothing else, and a resume goes on as if nothing had
happened:

    group   the lowest (n + 1/2) / weight, n windows read of it so far (the first on a tie)
    lane    the lowest position (the first on a tie), among those with a whole window left

With one group, that is a round of one window from each lane. With several it is Webster's rule of
apportionment: after any number of windows every data set has its share, to within one window or
two. The weights are whole numbers, so no rounding decides what the stream is. Dealing whole lanes
to data sets by weight was the alternative: eight lanes know only eighths.

A lane that has no whole window left is passed over. A data set that has none left when its turn
comes is the end of the stream: to go on without it would be another mixture than was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Group(NamedTuple):
    """Consecutive lanes that hold one data set."""

    name: str
    first: int
    lanes: int
    weight: int

    @property
    def members(self) -> range:
        """Their numbers."""
        return range(self.first, self.first + self.lanes)


class Turns:
    """The rule, for fixed groups.

    Args:
        groups: They hold all lanes, in order.
        seq_len: T: a window is T + 1 tokens, the next begins T later.
    """

    def __init__(self, groups: Sequence[Group], seq_len: int) -> None:
        self.groups, self._T = tuple(groups), seq_len

    def next_lane(self, positions: Sequence[int], ends: Sequence[int | None]) -> int | None:
        """The lane that the next window comes from; None at the end of the stream.

        Args:
            positions: Where every lane stands, multiples of T.
            ends: Every lane's length in tokens, as far as it is known.
        """
        T = self._T
        open_lanes = [
            lane
            for lane in self.next_group(positions).members
            if (end := ends[lane]) is None or positions[lane] + T + 1 <= end
        ]
        return min(open_lanes, key=lambda lane: (positions[lane], lane), default=None)

    def next_group(self, positions: Sequence[int]) -> Group:
        """The data set that the next window comes from."""
        if len(self.groups) == 1:
            return self.groups[0]
        behind, least = self.groups[0], self.windows(self.groups[0], positions)
        for group in self.groups[1:]:
            count = self.windows(group, positions)
            # (count + 1/2) / group.weight < (least + 1/2) / behind.weight, in whole numbers
            if (2 * count + 1) * behind.weight < (2 * least + 1) * group.weight:
                behind, least = group, count
        return behind

    def reached(self, lane: int, window: int, most: Sequence[int | None]) -> list[int]:
        """Windows read of every lane when the reader comes to a window of one of them.

        Args:
            lane: Its lane.
            window: Its number there.
            most: Whole windows of every lane that has ended; None: of the others.
        """
        own = next(group for group in self.groups if lane in group.members)
        count = sum(_least(window + (other < lane), most[other]) for other in own.members)
        found: list[int] = []
        for group in self.groups:
            if group is own:
                found += [_least(window + (other < lane), most[other]) for other in own.members]
                continue
            # its windows k with (2k + 1) / group.weight below (2 count + 1) / own.weight; a tie
            # goes to the first
            limit = (2 * count + 1) * group.weight + (group.first < own.first)
            read = max(0, -(-(limit - own.weight) // (2 * own.weight)))
            found += self._dealt(group, read, most)
        return found

    def _dealt(self, group: Group, count: int, most: Sequence[int | None]) -> list[int]:
        """So many windows of a group, by lane."""
        low, high = 0, count + 1  # whole rounds
        while high - low > 1:
            middle = (low + high) // 2
            whole = sum(_least(middle, most[lane]) for lane in group.members)
            low, high = (middle, high) if whole <= count else (low, middle)
        dealt = [_least(low, most[lane]) for lane in group.members]
        left = count - sum(dealt)
        for number, lane in enumerate(group.members):
            if left and _least(low + 1, most[lane]) > low:
                dealt[number], left = low + 1, left - 1
        return dealt

    def windows(self, group: Group, positions: Sequence[int]) -> int:
        """Windows that have been read of a group."""
        return sum(positions[lane] for lane in group.members) // self._T

    def shares(self, positions: Sequence[int]) -> dict[str, float]:
        """The part of all windows that each group has had; empty before the first."""
        counts = {group.name: self.windows(group, positions) for group in self.groups}
        total = sum(counts.values())
        return {name: count / total for name, count in counts.items()} if total else {}


def row_digest(window: np.ndarray) -> bytes:
    """SHA-256 of one row's tokens, as they stand in the ring."""
    return hashlib.sha256(memoryview(window).cast("B")).digest()


def batch_hash(digests: Iterable[bytes]) -> str:
    """SHA-256 of an update's rows' digests in the order of the turns: whoever holds the rows, 32
    bytes of each are enough to say what the whole was."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _least(count: int, most: int | None) -> int:
    return count if most is None else min(count, most)


def one_group(lanes: int) -> tuple[Group, ...]:
    """All lanes hold one data set."""
    return (Group("all", 0, lanes, 1),)
