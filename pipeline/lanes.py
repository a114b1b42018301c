"""Which shard comes when in which lane: the stream's order, as a pure function.

Runs in: supervisor. Pure.

Each epoch's shards are put in catalog order, or permuted by the seed, and dealt one after the
other to the lane that has the fewest bytes so far in that epoch (the lowest lane on a tie).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import xxhash


class Turn(NamedTuple):
    """One shard at its place in a lane."""

    epoch: int
    shard: int  # index in the catalog


def permutation(num_shards: int, seed: int, epoch: int) -> list[int]:
    """The shards of one epoch in shuffled order: sorted by a hash, so that no library's random
    generator decides what the stream is."""

    def rank(shard: int) -> tuple[int, int]:
        return xxhash.xxh3_64_intdigest(b"%d:%d:%d" % (seed, epoch, shard)), shard

    return sorted(range(num_shards), key=rank)


def deal(sizes_bytes: Sequence[int | None], order: Sequence[int], lanes: int) -> list[list[int]]:
    """Deal the shards, in order, to the lane with the fewest bytes.

    An unknown size counts as the mean of the known ones.
    """
    known = [size for size in sizes_bytes if size is not None]
    default = sum(known) // len(known) if known else 1
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, lane) for lane in range(lanes)]
    for shard in order:
        load, lane = heapq.heappop(heap)
        dealt[lane].append(shard)
        size = sizes_bytes[shard]
        heapq.heappush(heap, (load + max(1, default if size is None else size), lane))
    return dealt


class Lanes(Protocol):
    """Which shard comes when in which lane: LanePlan, or several of them side by side."""

    lanes: int

    @property
    def endless(self) -> bool: ...

    def turn(self, lane: int, sequence: int) -> Turn | None: ...


class LanePlan:
    """All lanes' shards over all epochs, computed epoch by epoch when asked for.

    Args:
        sizes_bytes: Size of every shard in catalog order, None where unknown.
        lanes: L, between 1 and the number of shards.
        seed: Permutes the shards of every epoch; None keeps catalog order.
        epochs: Passes over the shards; None repeats them for ever.
    """

    def __init__(
        self,
        sizes_bytes: Sequence[int | None],
        *,
        lanes: int,
        seed: int | None,
        epochs: int | None,
    ) -> None:
        if not 1 <= lanes <= len(sizes_bytes):
            raise ValueError(f"{lanes} lanes for {len(sizes_bytes)} shards")
        self.lanes = lanes
        self._sizes = sizes_bytes
        self._seed = seed
        self._epochs = epochs
        self._turns: list[list[Turn]] = [[] for _ in range(lanes)]
        self._dealt_epochs = 0

    @property
    def endless(self) -> bool:
        """Whether the shards are repeated for ever."""
        return self._epochs is None

    def turn(self, lane: int, sequence: int) -> Turn | None:
        """The lane's sequence-th shard, or None after its last one."""
        turns = self._turns[lane]
        while len(turns) <= sequence:
            if self._epochs is not None and self._dealt_epochs >= self._epochs:
                return None
            self._deal_next_epoch()
        return turns[sequence]

    def _deal_next_epoch(self) -> None:
        epoch, n = self._dealt_epochs, len(self._sizes)
        order = range(n) if self._seed is None else permutation(n, self._seed, epoch)
        for lane, shards in enumerate(deal(self._sizes, order, self.lanes)):
            self._turns[lane] += [Turn(epoch, shard) for shard in shards]
        self._dealt_epochs += 1
