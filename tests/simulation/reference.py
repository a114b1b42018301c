"""What the stream must be: a tiny independent function of (shards, lanes, seed, skips).

Pure, and it shares no code with the pipeline: the loops are as plain as the design's sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import xxhash

from tests.simulation.worlds import SimShard, World

# position, shards, documents, text_bytes, bad_records, filtered
Mark = tuple[int, int, int, int, int, int]
FILTERED_PER_BAD = 2  # in these worlds


@functools.cache
def tokens_of(shard: int, block: int, count: int) -> list[int]:
    """The tokens of a block; no token of a world occurs twice in one epoch."""
    first = shard * 10_000 + block * 100
    return list(range(first, first + count))


def text_bytes_of(shard: int, block: int) -> int:
    """Size of a block's text."""
    return 1 + (shard * 7 + block * 3) % 11


def dealt(world: World, epoch: int) -> list[list[int]]:
    """The shards of every lane in one epoch: each data set deals its own."""
    lanes: list[list[int]] = []
    first = 0
    for one in world.sets:
        of_set = _dealt(world, epoch, world.shards[first : first + one.shards], one.lanes)
        lanes += [[first + shard for shard in lane] for lane in of_set]
        first += one.shards
    return lanes


def _dealt(world: World, epoch: int, shards: Sequence[SimShard], num_lanes: int) -> list[list[int]]:
    order = list(range(len(shards)))
    if world.shuffle is not None:
        order.sort(
            key=lambda s: (xxhash.xxh3_64_intdigest(f"{world.shuffle}:{epoch}:{s}".encode()), s)
        )
    known = [shard.listed for shard in shards if shard.listed is not None]
    mean = sum(known) // len(known) if known else 1
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    load = [0] * num_lanes
    for shard in order:
        lane = load.index(min(load))
        lanes[lane].append(shard)
        size = shards[shard].listed
        load[lane] += max(1, mean if size is None else size)
    return lanes


class LaneStream:
    """One lane's tokens from its very beginning, as far as they were asked for.

    Args:
        world: The world.
        lane: Which lane.
        skips: (lane, sequence, block, rest) of what is left out; may grow behind what was read.
    """

    def __init__(self, world: World, lane: int, skips: set[tuple[int, int, int, bool]]) -> None:
        self.world, self.lane, self.skips = world, lane, skips
        self.tokens: list[int] = []
        self.at = (0, 0)  # sequence and block that come next
        self.ended = False
        self._turns: list[int] = []
        self._epoch = 0
        self._totals = (0, 0, 0)  # documents, text bytes, bad records
        self.marks: dict[tuple[int, int], Mark] = {(0, 0): (0, 0, 0, 0, 0, 0)}
        self._mark()

    def _turn(self, sequence: int) -> int | None:
        while len(self._turns) <= sequence:
            if self.world.epochs is not None and self._epoch >= self.world.epochs:
                return None
            self._turns += dealt(self.world, self._epoch)[self.lane]
            self._epoch += 1
        return self._turns[sequence]

    def shard_at(self, sequence: int) -> int:
        """The shard of a turn that exists."""
        shard = self._turn(sequence)
        assert shard is not None
        return shard

    def _mark(self) -> None:
        sequence, block = self.at
        self.ended = block == 0 and self._turn(sequence) is None
        documents, text_bytes, bad = self._totals
        filtered = FILTERED_PER_BAD * bad
        self.marks[sequence, block] = (
            len(self.tokens), sequence, documents, text_bytes, bad, filtered
        )  # fmt: skip

    def advance(self) -> None:
        """One block further, or to the lane's next shard."""
        sequence, block = self.at
        index = self.shard_at(sequence)
        shard: SimShard = self.world.shards[index]
        documents, text_bytes, bad = self._totals
        left_out = (self.lane, sequence, block, True) in self.skips
        if left_out or block == len(shard.blocks):
            self.at = (sequence + 1, 0)
            self._totals = (documents, text_bytes, bad + (0 if left_out else shard.end_bad))
        else:
            one = shard.blocks[block]
            self.at = (sequence, block + 1)
            if (self.lane, sequence, block, False) in self.skips:
                self._totals = (documents, text_bytes, bad + one.bad)
            else:
                self.tokens += tokens_of(index, block, one.tokens)
                size = text_bytes_of(index, block)
                self._totals = (documents + one.documents, text_bytes + size, bad + one.bad)
        self._mark()

    def upto(self, position: int) -> Sequence[int]:
        """The stream, at least up to a position unless it ends before."""
        while len(self.tokens) < position and not self.ended:
            self.advance()
        return self.tokens

    def mark(self, sequence: int, block: int) -> Mark | None:
        """Position and totals at the beginning of a block; None if there is no such place."""
        while (sequence, block) not in self.marks and self.at < (sequence, block):
            if self.ended:
                return None
            self.advance()
        return self.marks.get((sequence, block))

    def end(self) -> Mark:
        """Position and totals at the end of a finite lane."""
        while not self.ended:
            self.advance()
        return self.marks[self.at]
