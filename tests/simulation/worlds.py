"""What a simulated world is made of, and how a seed draws one.

Pure: a world is plain data, so a failing one can be made smaller and run again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple


class SimBlock(NamedTuple):
    """A block as the decompressor will cut it."""

    tokens: int
    documents: int
    bad: int  # bad records


class Poison(NamedTuple):
    """Work that kills the worker which does it."""

    at: str  # fetch, open, fill, encode, place
    block: int
    deaths: int  # how often before it works after all


class SimShard(NamedTuple):
    """One shard, as it is and as the catalog says it is."""

    size: int  # bytes, in truth
    listed: int | None  # what the catalog says; None: unknown
    local: bool
    blocks: tuple[SimBlock, ...]
    end_bad: int = 0  # bad records after the last block
    unreadable: int | None = None  # cannot be read on from this block on
    failures: int = 0  # fetches that fail for good before one works
    poison: Poison | None = None
    streamed: bool = False  # with --max-disk 0: it is remote, and read as a local one is

    @property
    def lying(self) -> bool:
        """Its size is known and wrong: it can never be fetched."""
        return not self.local and self.listed is not None and self.listed != self.size


class SimSet(NamedTuple):
    """One of several data sets: consecutive shards, in consecutive lanes of its own."""

    shards: int
    lanes: int
    weight: int


class Fault(NamedTuple):
    """Something that goes wrong at a step of the world."""

    step: int
    kind: str
    arg: float  # in [0, 1): which worker, shard or how long


@dataclass(frozen=True)
class World:
    """Everything that a simulation depends on."""

    seed: int
    shards: tuple[SimShard, ...]
    lanes: int
    epochs: int | None
    shuffle: int | None
    seq_len: int
    slot_windows: int
    ring_slots: int
    text_slots: int
    fetchers: int
    decompressors: int
    tokenizers: int
    prefetch: int
    extra_bytes: int  # budget beyond the smallest that can work; below 0: too small
    step_bytes: int
    fixed_bytes: int
    checkpoint_bytes: int
    kept: int  # checkpoints
    understated: int  # a resumed run learns the full size of checkpoints from the consumer alone
    max_bad_records: int
    max_bad_shards: int
    writer: bool  # the consumer reads every token, not windows
    update_windows: int  # windows of one optimizer update
    checkpoint_every: int  # updates
    stop_after: int | None  # updates of an endless run
    slow: tuple[int, ...]  # per kind of actor, how much slower than others it is
    faults: tuple[Fault, ...]
    mix: tuple[SimSet, ...] = ()  # none: all shards are of one data set

    @property
    def sets(self) -> tuple[SimSet, ...]:
        """The data sets, one if there is no mix."""
        return self.mix or (SimSet(len(self.shards), self.lanes, 1),)

    @property
    def floor(self) -> int:
        """Bytes that every lane is sure of, as pipeline/budget.py states it."""
        remote = [shard.listed for shard in self.shards if not shard.local]
        known = max((size for size in remote if size is not None), default=0)
        return max(known, self.step_bytes) if None in remote else known

    @property
    def checkpoints(self) -> int:
        """Bytes of all checkpoints, the one being written included."""
        return 0 if self.writer else self.checkpoint_bytes * (self.kept + 1)

    @property
    def budget(self) -> int:
        """The disk budget."""
        return self.fixed_bytes + self.checkpoints + self.floor * self.lanes + self.extra_bytes


WORKER_FAULTS = ("kill", "kill_before_send", "kill_after_send", "kill_midway", "hang", "stall")
WORLD_FAULTS = (
    "hang_at_start",
    "disk_full",
    "new_version",
    "damage",
    "server_fails",
    "other_tokens",
)
ENDINGS = (
    "consumer_killed",
    "consumer_killed_writing",
    "consumer_stall",
    "supervisor_killed",
    "machine_down",
    "rewind",
    "stop",
    "lose_cache",
)
# What a world is mostly about: what is rare in the average world is common in one of these.
_THEMES: dict[str, tuple[str, ...]] = {
    "anything": (*WORKER_FAULTS, *WORLD_FAULTS, *ENDINGS),
    "workers": (*WORKER_FAULTS, "hang_at_start"),
    "little room": ("disk_full", "consumer_stall", "lose_cache", "kill", "stop", "machine_down"),
    "few shards": ("damage", "damage", "server_fails", "kill", "kill_after_send", "hang"),
    "bad shards": (*ENDINGS, "server_fails", "kill"),
    "many resumes": (*ENDINGS, "kill", "new_version"),
}


def draw(seed: int) -> World:
    """The world of a seed: small, so that many can be run; odd, so that much can go wrong."""
    return _special(draw_plain(seed), Random(f"special {seed}"))


def draw_plain(seed: int) -> World:
    """The same of one data set, with shards in the cache: nothing else in it depends on that."""
    rng = Random(seed)
    r = rng.random

    def upto(most: int) -> int:
        return int(r() * (most + 1))

    theme = list(_THEMES)[upto(len(_THEMES) - 1)]
    few, tight, bad = theme == "few shards", theme == "little room", theme == "bad shards"
    shards = tuple(_shard(rng, theme) for _ in range(1 + upto(1 if few else 4)))
    lanes = 1 + upto(min(3, len(shards) - 1))
    endless = r() < 0.1 and any(block.tokens for shard in shards for block in shard.blocks)
    some_epochs = 2 + upto(2) if few or r() < 0.3 else 1
    num_faults = 0 if r() < 0.15 else upto(9)
    return World(
        seed=seed,
        shards=shards,
        lanes=lanes,
        epochs=None if endless else some_epochs,
        shuffle=upto(99) if r() < 0.5 else None,
        seq_len=1 + upto(3),
        slot_windows=1 + upto(3),
        ring_slots=2 + upto(2),
        text_slots=lanes + upto(4),
        fetchers=1 + upto(2),
        decompressors=1 + upto(2),
        tokenizers=1 + upto(2),
        prefetch=upto(3),
        extra_bytes=-1 - upto(9) if r() < 0.02 else upto(30) if tight else upto(80),
        step_bytes=1 + upto(9),
        fixed_bytes=upto(5),
        checkpoint_bytes=upto(12),
        kept=1 + upto(1),
        understated=upto(12) if tight or r() < 0.2 else 0,
        max_bad_records=99 if r() < 0.7 else upto(3),
        max_bad_shards=upto(2) if r() < (0.2 if bad else 0.5) else 99,
        writer=r() < 0.4,
        update_windows=1 + upto(3),
        checkpoint_every=1 + upto(1 if theme == "many resumes" else 4),
        stop_after=1 + upto(12) if endless else None,
        slow=tuple(1 if r() < 0.6 else 2 + upto(8) for _ in range(5)),
        faults=tuple(sorted(_fault(rng, _THEMES[theme]) for _ in range(num_faults))),
    )


def _special(world: World, rng: Random) -> World:
    """Some worlds mix data sets, and some have no shard on the disk."""
    if rng.random() < 0.08:
        shards = (
            one._replace(local=True, streamed=not one.local, listed=one.size)
            for one in world.shards
        )
        world = replace(world, shards=tuple(shards))
    if world.lanes > 1 and not world.writer and rng.random() < 0.3:
        num = rng.randint(2, world.lanes)
        firsts = [0, *sorted(rng.sample(range(1, world.lanes), num - 1)), world.lanes]
        lanes = [end - begin for begin, end in itertools.pairwise(firsts)]
        shards_of = list(lanes)
        for _ in range(len(world.shards) - world.lanes):
            shards_of[rng.randrange(num)] += 1
        mix = (SimSet(*one, rng.randint(1, 5)) for one in zip(shards_of, lanes, strict=True))
        world = replace(world, mix=tuple(mix))
    return world


def _fault(rng: Random, kinds: tuple[str, ...]) -> Fault:
    step = int(2 ** (rng.random() * 8.5))  # early and late ones alike
    return Fault(step, kinds[int(rng.random() * len(kinds))], rng.random())


def _shard(rng: Random, theme: str) -> SimShard:
    r = rng.random
    bad = 4 if theme == "bad shards" else 1
    num_blocks = 0 if r() < 0.08 else 1 + int(r() * 4)
    size = int(r() * 30)
    local = r() < 0.1
    unknown = r() < (0.7 if theme == "little room" else 0.2) and not local
    lies = r() < 0.02 * bad and not local and not unknown
    poison = None
    if r() < 0.04 * bad:
        at = ("fetch", "open", "fill", "encode", "place")[int(r() * 5)]
        block = int(r() * (num_blocks + 1))
        poison = Poison(at, block, 99 if r() < 0.3 else 1 + int(r() * 6))
    return SimShard(
        size=size,
        listed=None if unknown else int(r() * 30) if lies else size,
        local=local,
        blocks=tuple(_block(rng, 0.06 * bad) for _ in range(num_blocks)),
        end_bad=1 if r() < 0.1 * bad else 0,
        unreadable=int(r() * (num_blocks + 1)) if r() < 0.05 * bad else None,
        failures=1 + int(r() * 3) if r() < 0.03 * bad else 0,
        poison=poison,
    )


def _block(rng: Random, bad: float) -> SimBlock:
    r = rng.random
    tokens = 0 if r() < 0.08 else 1 + int(r() * r() * 24)
    return SimBlock(tokens, int(r() * 4), 1 if r() < bad else 0)
