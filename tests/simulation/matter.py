"""What the simulated processes write to: disk, ring and text slots, with their own memory.

Nothing here asks the scheduler anything: these models know only what was really done, and
complain when it ought not to have been.
"""

from __future__ import annotations

from tests.simulation.worlds import World


class Violation(AssertionError):  # noqa: N818 - it says what was violated
    """A promise was broken."""


class Disk:
    """Bytes really on disk: logs, checkpoints, partial and whole files, deleted open files."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.budget = world.budget
        self.partial: dict[int, int] = {}
        self.whole: dict[int, int] = {}
        self.damaged: dict[int, int] = {}  # shard → the first block that cannot be read
        self.readers: dict[int, int] = {}  # shard → open files of the present whole copy
        self.orphans: dict[tuple[int, int], int] = {}  # (shard, copy) → readers of a deleted copy
        self._orphan_bytes: dict[tuple[int, int], int] = {}
        self.copies: dict[int, int] = {}  # shard → how often it was deleted
        self.bytes = world.fixed_bytes  # the logs may be full at any time
        self.peak = self.bytes

    def add(self, size: int) -> None:
        """Bytes were written (or, below 0, deleted)."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        if self.bytes > self.budget:
            raise Violation(f"{self.bytes} bytes on disk, the budget is {self.budget}")

    def write(self, shard: int, size: int) -> None:
        """A fetcher has appended to a partial file."""
        self.partial[shard] += size
        self.add(size)

    def truncate(self, shard: int) -> int:
        """A fetcher starts over; returns the bytes thrown away."""
        lost, self.partial[shard] = self.partial[shard], 0
        self.add(-lost)
        return lost

    def rename(self, shard: int) -> int:
        """A partial file is whole; returns its size."""
        size = self.whole[shard] = self.partial.pop(shard)
        self.damaged.pop(shard, None)
        return size

    def size(self, shard: int) -> int:
        """Bytes of a shard that can be found in the folder."""
        return self.partial.get(shard, 0) + self.whole.get(shard, 0)

    def evict(self, shard: int) -> None:
        """Delete whatever there is; a copy that is open keeps its bytes until it is closed."""
        self.add(-self.partial.pop(shard, 0))
        size = self.whole.pop(shard, 0)
        self.damaged.pop(shard, None)
        readers = self.readers.pop(shard, 0)
        copy = self.copies.get(shard, 0)
        self.copies[shard] = copy + 1
        if readers and size:
            self.orphans[shard, copy] = readers
            self._orphan_bytes[shard, copy] = size
        else:
            self.add(-size)

    def open(self, shard: int) -> tuple[int, int]:
        """A decompressor opens a whole file."""
        if shard not in self.whole:
            raise Violation(f"shard {shard} is to be read, and was deleted or never fetched")
        self.readers[shard] = self.readers.get(shard, 0) + 1
        return shard, self.copies.get(shard, 0)

    def close(self, handle: tuple[int, int]) -> None:
        """A decompressor closes a file, or dies."""
        shard, copy = handle
        if handle in self.orphans:
            self.orphans[handle] -= 1
            if not self.orphans[handle]:
                del self.orphans[handle]
                self.add(-self._orphan_bytes.pop(handle))
        elif copy == self.copies.get(shard, 0):
            self.readers[shard] -= 1

    def restart(self, *, lost_partials: bool) -> None:
        """All processes are gone; after a power loss partial files are not trusted."""
        for size in self._orphan_bytes.values():
            self.add(-size)
        self.orphans.clear()
        self._orphan_bytes.clear()
        self.readers.clear()
        if lost_partials:
            for shard in list(self.partial):
                self.add(-self.partial.pop(shard))


class SimRing:
    """The ring of one generation: who may write which position, and what stands there."""

    def __init__(self, world: World, positions: list[int]) -> None:
        self.C = world.seq_len * world.slot_windows
        self.slots = world.ring_slots
        C = self.C
        self.cells = [[[-1] * (C + 1) for _ in range(self.slots)] for _ in range(world.lanes)]
        self.released = [position // C for position in positions]
        self.valid = list(positions)  # tokens before this were published

    def place(self, lane: int, position: int, tokens: list[int]) -> None:
        """A tokenizer writes tokens, halos included."""
        C, slots, cells = self.C, self.slots, self.cells[lane]
        if not tokens:
            return
        if position < self.valid[lane]:
            raise Violation(f"lane {lane}: {position} is written again, after it was published")
        if position + len(tokens) > (self.released[lane] + slots) * C:
            raise Violation(f"lane {lane}: {position}+{len(tokens)} overwrites unread tokens")
        done = 0
        while done < len(tokens):
            slot, at = divmod(position + done, C)
            piece = tokens[done : done + C - at]
            cells[slot % slots][at : at + len(piece)] = piece
            if at == 0 and slot:
                cells[(slot - 1) % slots][C] = piece[0]
            done += len(piece)

    def read(self, lane: int, begin: int, end: int) -> list[int]:
        """Tokens of one slot and its halo."""
        slot, at = divmod(begin, self.C)
        if at + end - begin > self.C + 1:
            raise Violation(f"lane {lane}: {begin} to {end} is no view of one slot")
        return self.cells[lane][slot % self.slots][at : at + end - begin]


class Slots:
    """The text slots: what stands in them, and whose they are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.content: dict[int, tuple[int, int]] = {}  # slot → (shard, block) that was written
        self.lent: dict[int, tuple[str, object]] = {}  # slot → what it is lent for

    def lend(self, slot: int, worker: str) -> None:
        """A FillBlock names the slot."""
        if slot in self.lent:
            raise Violation(f"text slot {slot} is given away, but is lent for {self.lent[slot]}")
        self.lent[slot] = ("fill", worker)
        self.content.pop(slot, None)

    def give_back(self, slot: int) -> None:
        """Nobody needs it any more."""
        del self.lent[slot]

    def worker_died(self, worker: str) -> None:
        """What it was filling is free."""
        for slot in [s for s, lent in self.lent.items() if lent == ("fill", worker)]:
            del self.lent[slot]
