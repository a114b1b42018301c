"""Simulated workers: what each kind of process does with its messages, and how it dies.

A process takes one step at a time: it takes a message, does a piece of work or sends. Faults come
between steps, or inside one (`doom`): midway through a write, before or after the next send. What
was sent before a death is delivered, as a socket would; what was not, never is.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pipeline.messages import (
    BadRecord,
    BlockFilled,
    BlockStart,
    Encode,
    Encoded,
    Entry,
    Fetch,
    FetchFailed,
    FetchProgress,
    FillBlock,
    Grant,
    Hello,
    Message,
    OpenShard,
    Place,
    Placed,
    ReserveMore,
    ShardEnded,
    ShardFetched,
    ShardUnreadable,
)
from tests.simulation.matter import Violation
from tests.simulation.reference import FILTERED_PER_BAD, text_bytes_of, tokens_of

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

_BAD = BadRecord("line 1", "simulated")


class Died(Exception):  # noqa: N818 - not an error: a process has ended
    """The process ended inside its step."""


class Process:
    """A process and its socket."""

    role = ""

    def __init__(self, sim: Simulation, name: str, slowness: int) -> None:
        self.sim, self.name = sim, name
        self.speed = 1 / slowness
        self.inbox: deque[Message] = deque()
        self.outbox: deque[Message] = deque()
        self.alive = True
        self.hung = False
        self.stalled_until = 0.0
        self.booted = False
        self.unwanted = False  # killed by the scheduler, for nothing that it did
        self.doom = ""  # where it dies: midway, before_send, after_send

    # ── what the world may ask ──────────────────────────────────────────────────────────────

    def busy(self) -> bool:
        """Whether there is anything to do besides taking messages."""
        return False

    def work(self) -> None:
        """Do a piece of work."""

    def take(self, message: Message) -> None:
        """Take a message."""
        raise NotImplementedError

    def released(self) -> None:
        """Called at death: what the operating system takes back."""

    def can_step(self) -> bool:
        """Whether it has something to do now."""
        return (
            self.alive
            and not self.hung
            and (not self.booted or bool(self.inbox) or self.busy())
            and self.sim.now >= self.stalled_until
        )

    def stalled(self) -> bool:
        """Whether it is held up, and will go on by itself."""
        return self.sim.now < self.stalled_until

    def step(self) -> None:
        """One piece of life; dies where its doom is."""
        try:
            if not self.booted:
                self.booted = True
                self.boot()
            elif self.inbox and (not self.busy() or self.sim.random() < 0.7):
                self.take(self.inbox.popleft())
            else:
                self.work()
        except Died:
            self.die()

    def boot(self) -> None:
        """The first thing that it does."""
        self.send(Hello(self.role, 0))

    def send(self, message: Message) -> None:
        """Put a message into the socket."""
        if self.doom == "before_send":
            raise Died
        self.outbox.append(message)
        if self.doom == "after_send":
            raise Died

    def midway(self) -> bool:
        """Whether it dies in the middle of what it is writing."""
        return self.doom == "midway"

    def die(self) -> None:
        """End now; the socket keeps what was sent."""
        if self.alive:
            self.alive = False
            self.inbox.clear()
            self.released()


class Fetcher(Process):
    """One shard at a time, up to its limit, in pieces."""

    role = "fetcher"
    fetch: Fetch | None = None
    limit = 0
    asked = False
    fails_at: int | None = None
    refetched = 0

    def busy(self) -> bool:
        return self.fetch is not None and not self.asked

    def take(self, message: Message) -> None:
        if isinstance(message, Grant) and self.asked:
            self.limit, self.asked = message.limit_bytes, False
        elif isinstance(message, Fetch) and self.fetch is None:
            self._begin(message)
        else:
            raise Violation(f"{self.name} got {message!r}")

    def _begin(self, fetch: Fetch) -> None:
        sim, shard = self.sim, fetch.shard
        if shard in sim.disk.whole:
            self.send(ShardFetched(shard, f"{shard}", sim.disk.whole[shard]))
            return
        self.fetch, self.limit, self.refetched, self.fails_at = fetch, fetch.limit_bytes, 0, None
        have = sim.disk.partial.setdefault(shard, 0)
        if shard in sim.new_versions:
            sim.new_versions.discard(shard)
            self.refetched = sim.disk.truncate(shard) if have else 0
        if sim.failures_left(shard):
            size = sim.world.shards[shard].size
            self.fails_at = have + int(sim.random() * (size - have + 1))

    def work(self) -> None:
        sim, fetch = self.sim, self.fetch
        assert fetch is not None
        index = fetch.shard
        shard, have = sim.world.shards[index], sim.disk.partial[index]
        if sim.poisoned("fetch", index, 0):
            raise Died
        if sim.now < sim.disk_full_until:
            self._answer(FetchFailed(index, "the disk is full", "free some", disk_full=True))
            return
        goal = shard.size if fetch.size_bytes is None else min(shard.size, fetch.size_bytes)
        if self.fails_at is not None and have >= self.fails_at:
            sim.failed(index)
            self._answer(FetchFailed(index, f"{fetch.name}: no answer", "check the network"))
        elif have < goal:
            self._write(index, min(goal - have, 1 + int(sim.random() * 20)), have)
        elif shard.lying:
            sim.disk.truncate(index)
            self._answer(FetchFailed(index, f"{fetch.name}: not its size", "start again"))
        else:
            size = sim.disk.rename(index)
            if self.midway():
                raise Died
            self._answer(ShardFetched(index, f"{index}", size, self.refetched))

    def _write(self, shard: int, size: int, have: int) -> None:
        size = min(size, self.limit - have)
        if size <= 0:
            self.asked = True
            self.send(ReserveMore(shard, have))
            return
        if self.midway():
            self.sim.disk.write(shard, (size + 1) // 2)
            raise Died
        self.sim.disk.write(shard, size)
        if self.sim.random() < 0.15:
            self.send(FetchProgress(shard, have + size))

    def _answer(self, message: Message) -> None:
        self.send(message)
        self.fetch = None


def _begins(block: int) -> BlockStart:
    """Where a block begins, in these worlds."""
    return BlockStart(Entry(block), 0)


class _Stream:
    """An open shard of a decompressor."""

    def __init__(self, message: OpenShard, shard: int) -> None:
        self.shard, self.next, self.skip = shard, 0, message.skip_blocks
        self.end = message.end_block
        if message.place != (_begins(self.skip) if self.skip else None):
            raise Violation(f"block {self.skip} does not begin at {message.place}")
        self.handle: tuple[int, int] | None = None


class Decompressor(Process):
    """Shards into text slots."""

    role = "decompressor"

    def __init__(self, sim: Simulation, name: str, slowness: int) -> None:
        super().__init__(sim, name, slowness)
        self.streams: dict[int, _Stream] = {}

    def released(self) -> None:
        for stream in self.streams.values():
            self._close(stream)

    def _close(self, stream: _Stream) -> None:
        if stream.handle is not None:
            self.sim.disk.close(stream.handle)
            stream.handle = None

    def take(self, message: Message) -> None:
        match message:
            case OpenShard():
                shard = self.sim.shard_named(message.name)
                if self.sim.poisoned("open", shard, 0):
                    raise Died
                self.streams[message.stream] = _Stream(message, shard)
            case FillBlock():
                if message.stream not in self.streams:
                    raise Violation(f"{self.name} has no stream {message.stream}")
                self._fill(message, self.streams[message.stream])
            case _:
                raise Violation(f"{self.name} got {message!r}")

    def _fill(self, message: FillBlock, stream: _Stream) -> None:
        sim, index = self.sim, stream.shard
        shard = sim.world.shards[index]
        if stream.handle is None and not shard.local:  # opened when the first block is wanted
            stream.handle = sim.disk.open(index)
        damaged = sim.disk.damaged.get(index) if not shard.local else None
        while stream.next < stream.skip and stream.next < len(shard.blocks):
            if damaged is not None and stream.next >= damaged:
                break
            stream.next += 1
        number = stream.next
        if sim.poisoned("fill", index, number):
            raise Died
        left_out = number == stream.end
        if damaged is not None and number >= damaged and not left_out:
            self._unreadable(message, stream, damaged=True)
        elif shard.unreadable is not None and number >= shard.unreadable and not left_out:
            self._unreadable(message, stream, damaged=False)
        elif number in (len(shard.blocks), stream.end):
            self._close(self.streams.pop(message.stream))
            num_bad = 0 if number == stream.end else shard.end_bad
            self.send(ShardEnded(message.stream, message.slot, number, num_bad, (_BAD,) * num_bad,
                                 FILTERED_PER_BAD * num_bad))  # fmt: skip
        else:
            self._write(message, stream, number)

    def _unreadable(self, message: FillBlock, stream: _Stream, *, damaged: bool) -> None:
        self._close(self.streams.pop(message.stream))
        name = f"shard-{stream.shard}"
        self.send(
            ShardUnreadable(
                stream=message.stream,
                slot=message.slot,
                block=stream.next,
                what=f"{name}: cannot be read on from block {stream.next}",
                remedy="fetch it again",
                cache_damaged=damaged,
                of_source=self.sim.world.shards[stream.shard].streamed,
            )
        )

    def _write(self, message: FillBlock, stream: _Stream, number: int) -> None:
        block = self.sim.world.shards[stream.shard].blocks[number]
        if self.midway():
            self.sim.slots.content[message.slot] = (-1, -1)
            raise Died
        self.sim.slots.content[message.slot] = (stream.shard, number)
        stream.next += 1
        self.send(
            BlockFilled(
                stream=message.stream,
                block=number,
                slot=message.slot,
                documents=block.documents,
                text_bytes=text_bytes_of(stream.shard, number),
                num_bad=block.bad,
                bad=(_BAD,) * block.bad,
                filtered=FILTERED_PER_BAD * block.bad,
                next=_begins(number + 1),
            )
        )


class Tokenizer(Process):
    """Text slots into the ring."""

    role = "tokenizer"

    def __init__(self, sim: Simulation, name: str, slowness: int) -> None:
        super().__init__(sim, name, slowness)
        self.waiting: deque[Encode] = deque()
        self.tokens: dict[int, list[int]] = {}

    def busy(self) -> bool:
        return bool(self.waiting)

    def take(self, message: Message) -> None:
        if isinstance(message, Encode):
            self.waiting.append(message)
        elif isinstance(message, Place):
            self._place(message)
        else:
            raise Violation(f"{self.name} got {message!r}")

    def work(self) -> None:
        """Encode what comes next; a poisoned block is the end."""
        sim, message = self.sim, self.waiting.popleft()
        shard, block = sim.slots.content[message.slot]
        if sim.poisoned("encode", shard, block):
            raise Died
        tokens = tokens_of(shard, block, sim.world.shards[shard].blocks[block].tokens)
        digest = hash((shard, block))
        if (shard, block) in sim.other_tokens:
            tokens, digest = [*tokens, -7], digest + 1
        self.tokens[message.block] = tokens
        self.send(Encoded(message.block, len(tokens), digest, 0.0))

    def _place(self, message: Place) -> None:
        if message.block not in self.tokens:
            raise Violation(f"{self.name} has no block {message.block} to place")
        tokens, last = self.tokens[message.block], message.first + message.count
        part = tokens[message.first : last]
        if len(part) != message.count:
            raise Violation(f"{message!r}: the block has {len(tokens)} tokens")
        if tokens and self.sim.poisoned("place", tokens[0] // 10_000, tokens[0] // 100 % 100):
            raise Died
        if self.midway():
            self.sim.ring.place(message.lane, message.position, part[: len(part) // 2])
            raise Died
        self.sim.ring.place(message.lane, message.position, part)
        if last == len(tokens):
            del self.tokens[message.block]
        self.send(Placed(message.block, message.first, message.count))


KINDS: dict[str, type[Process]] = {kind.role: kind for kind in (Fetcher, Decompressor, Tokenizer)}
