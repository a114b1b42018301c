"""A world in motion: generation after generation until its stream is read or rightly ended."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

from pipeline import mixture
from pipeline.catalog import Shard
from pipeline.config import Config, Data, DataSet, Stream, System
from pipeline.lanes import Lanes
from pipeline.messages import Cursor, LaneCursor, RingLayout, Stop
from pipeline.scheduler import CONSUMER
from pipeline.state import Plan, ShardInfo
from pipeline.turns import Group
from tests.simulation import checks
from tests.simulation.generation import Ended, Generation
from tests.simulation.matter import Disk, SimRing, Slots, Violation
from tests.simulation.processes import Process
from tests.simulation.reference import LaneStream
from tests.simulation.worlds import World

HANG_S = 20.0
MAX_STEPS = 12_000
MAX_GENERATIONS = 16
_ROOMY = 10_000
_MAX_DEATHS = 40  # of one shard's doing, before it is left out


class Simulation:
    """One world, run from its seed.

    Args:
        world: The world.
        trace: Gets a line for everything that happens, if given.
    """

    def __init__(self, world: World, trace: list[str] | None = None) -> None:
        self.world, self.trace = world, trace
        rng = Random(world.seed * 2 + 1)
        self.random = rng.random
        self.disk = Disk(world)
        self.now, self.steps, self.events = 0.0, 0, 0
        self.next_fault = 0
        self.injected: Counter[str] = Counter()
        self.durable: list[Cursor] = []  # the newest checkpoints, oldest first
        self.unfinished_checkpoint = 0  # bytes
        self.updates = 0
        self.blame: Counter[int] = Counter()  # shard → incidents that may end in leaving it out
        self.poison_left = {
            index: shard.poison.deaths for index, shard in enumerate(world.shards) if shard.poison
        }
        self.killed_by: Counter[int] = Counter()  # deaths since it was last left out
        self.failures = [shard.failures for shard in world.shards]
        self.new_versions: set[int] = set()
        self.other_tokens: set[tuple[int, int]] = set()
        self.disk_full_until = 0.0
        self.hang_next = False
        self.cured = False
        self.generations = 0
        self.outcome = ""
        self.count = itertools.count().__next__

    def log(self, who: str, what: object) -> None:
        """Keep what happened, if anybody wants to read it."""
        if self.trace is not None:
            self.trace.append(f"{self.now:8.2f} {who:14} {what}")

    # ── the run ─────────────────────────────────────────────────────────────────────────────

    def run(self) -> str:
        """Run to the end; returns how it ended: complete, or the error that ended it.

        Raises:
            Violation: a promise was broken.
        """
        while True:
            self.generations += 1
            if self.generations > MAX_GENERATIONS:
                raise Violation(f"{MAX_GENERATIONS} generations, and no end")
            gen = self._generation()
            if gen.error is not None:
                self.injected["ended_by_error"] += 1
                final = "no text at all" in gen.error.what or "other tokens" in gen.error.what
                if self.cured and not final:
                    raise Violation(f"cured, and ended again by {gen.error.what}")
                self.outcome = type(gen.error).__name__
                if final or self.random() < 0.3:
                    return self.outcome
                self._cure()
            elif gen.done is not None and gen.done.complete:
                if self.world.stop_after is None:
                    checks.complete(gen)
                return self.outcome or "complete"

    def _generation(self) -> Generation:
        zero = (LaneCursor(0, 0, 0, 0),) * self.world.lanes
        cursor = self.durable[-1] if self.durable else Cursor("f", {}, zero)
        self.ring = SimRing(self.world, [lane.position for lane in cursor.lanes])
        self.slots = Slots(self.world.text_slots)
        self.skips = {(s.lane, s.sequence, s.block, s.rest) for s in cursor.skips}
        self.streams = [LaneStream(self.world, n, self.skips) for n in range(self.world.lanes)]
        self.other_tokens.clear()
        self.log("generation", f"{self.generations} from {cursor.lanes} {sorted(self.skips)}")
        gen = Generation(self, cursor, self._known_checkpoint_bytes())
        whole = {shard: (f"{shard}", size) for shard, size in self.disk.whole.items()}
        try:
            gen.run(whole, dict(self.disk.partial))
        except Ended as why:
            self.log("generation", f"ended: {why}")
            self.disk.restart(lost_partials="machine" in str(why))
        else:
            self.disk.restart(lost_partials=False)
        return gen

    def _known_checkpoint_bytes(self) -> int | None:
        if self.world.writer:
            return 0
        if not self.durable:
            return None
        there = self.world.checkpoint_bytes * len(self.durable) + self.unfinished_checkpoint
        return max(there, self.world.checkpoints - self.world.understated) or None

    def _cure(self) -> None:
        """Somebody has read the error and does what it says: all the world's causes go."""
        self.cured = True
        self.poison_left.clear()
        self.failures = [0] * len(self.failures)
        self.disk.budget = _ROOMY

    def plan(self, cursor: Cursor) -> Plan:
        """What the supervisor would hand to the scheduler."""
        world = self.world
        firsts = itertools.accumulate((one.lanes for one in world.sets), initial=0)
        groups = tuple(
            Group(f"set-{number}", first, one.lanes, one.weight)
            for number, (first, one) in enumerate(zip(firsts, world.sets, strict=False))
        )
        return Plan(
            shards=tuple(
                ShardInfo(
                    name=f"shard-{index}",
                    url="",
                    key=f"{index}",
                    version="1",
                    size_bytes=shard.listed,
                    local_path=f"/{index}" if shard.local else None,
                    streamed=shard.streamed,
                )
                for index, shard in enumerate(world.shards)
            ),
            lanes=self._lanes(groups),
            groups=groups if world.mix else (),
            ring=RingLayout(world.lanes, world.ring_slots, world.seq_len * world.slot_windows, 2),
            seq_len=world.seq_len,
            text_slots=world.text_slots,
            cache_dir="",
            budget_bytes=self.disk.budget,
            fixed_bytes=world.fixed_bytes,
            workers={
                "fetcher": world.fetchers,
                "decompressor": world.decompressors,
                "tokenizer": world.tokenizers,
            },
            prefetch=world.prefetch,
            max_bad_records=_ROOMY if self.cured else world.max_bad_records,
            max_bad_shards=_ROOMY if self.cured else world.max_bad_shards,
            max_restarts=6,
            grant_step_bytes=world.step_bytes,
            hang_s=HANG_S,
            disk_full_retry_s=1.0,
            cursor=cursor,
        )

    def _lanes(self, groups: tuple[Group, ...]) -> Lanes:
        """Which shard comes when in which lane, by the rule of a run with this configuration."""
        world = self.world
        data_sets = {group.name: DataSet([], epochs=world.epochs) for group in groups}
        stream = Stream(mix=data_sets, shuffle=world.shuffle is not None)
        config = Config("world", data=Data(stream=stream), system=System(seed=world.shuffle or 0))
        shards = [Shard(n, "", "", one.listed, "") for n, one in enumerate(world.shards)]
        return mixture.plan(config, shards, [one.shards for one in world.sets], groups)

    # ── what processes ask of the world ─────────────────────────────────────────────────────

    def shard_named(self, name: str) -> int:
        """Index of a shard."""
        return int(name.removeprefix("shard-"))

    def failures_left(self, shard: int) -> int:
        """Fetches of this shard that will fail for good."""
        return self.failures[shard]

    def failed(self, shard: int) -> None:
        """One of them has."""
        self.failures[shard] -= 1
        self.injected["server_failed"] += 1

    def poisoned(self, at: str, shard: int, block: int) -> bool:
        """Whether this work kills its worker, this time."""
        if not self.poison_left.get(shard):
            return False
        poison = self.world.shards[shard].poison
        assert poison is not None
        if poison.at != at or (at not in ("fetch", "open") and poison.block != block):
            return False
        self.poison_left[shard] -= 1
        self.killed_by[shard] += 1
        if self.killed_by[shard] > _MAX_DEATHS:
            raise Violation(f"shard {shard} has killed {_MAX_DEATHS} workers, and goes on")
        self.injected[f"poison_{at}"] += 1
        return True

    def disk_clean_checkpoints(self) -> None:
        """The trainer deletes what a death has left of an unfinished checkpoint."""
        self.disk.add(-self.unfinished_checkpoint)
        self.unfinished_checkpoint = 0

    # ── faults ──────────────────────────────────────────────────────────────────────────────

    def tick(self, gen: Generation) -> None:
        """Count a step, and let happen what is to happen at it."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Violation(f"livelock: {MAX_STEPS} steps, and no end")
        faults = self.world.faults
        while self.next_fault < len(faults) and faults[self.next_fault].step <= self.steps:
            fault = faults[self.next_fault]
            self.next_fault += 1
            self._inject(gen, fault.kind, fault.arg)

    def _inject(self, gen: Generation, kind: str, arg: float) -> None:
        workers = [c for c in gen.order if c.alive and c.name != CONSUMER]
        worker = workers[int(arg * len(workers))] if workers else None
        shard = int(arg * len(self.world.shards))
        done = True
        match kind:
            case "kill" | "kill_before_send" | "kill_after_send" | "kill_midway":
                done = self._harm(worker, kind)
            case "hang":
                done = worker is not None
                if worker is not None:
                    worker.hung = True
            case "hang_at_start":
                self.hang_next = True
            case "stall":
                done = worker is not None
                if worker is not None:
                    worker.stalled_until = self.now + arg * HANG_S * 1.2
            case "disk_full":
                self.disk_full_until = self.now + arg * 8
            case "new_version":
                self.new_versions.add(shard)
            case "server_fails":
                self.failures[shard] += not self.cured
            case "damage":
                done = self._damage(arg)
            case "other_tokens":
                done = self._other_tokens(gen, arg)
            case "stop" | "consumer_killed" | "consumer_killed_writing" | "consumer_stall":
                done = self._end_consumer(gen, kind, arg)
            case _:
                self._cut_off(kind, arg)
        self.injected[kind] += done
        if done:
            self.log("FAULT", f"{kind} {worker.name if worker else ''} shard {shard}")
        if kind in ("supervisor_killed", "machine_down", "rewind", "lose_cache"):
            raise Ended(kind)

    def _harm(self, worker: Process | None, kind: str) -> bool:
        if worker is None:
            return False
        if kind == "kill":
            worker.die()
        else:
            worker.doom = kind.removeprefix("kill_")
        return True

    def _damage(self, arg: float) -> bool:
        shards = sorted(self.disk.whole)
        if not shards:
            return False
        shard = shards[int(arg * len(shards))]
        self.disk.damaged[shard] = int(arg * 977) % (len(self.world.shards[shard].blocks) + 1)
        return True

    def _other_tokens(self, gen: Generation, arg: float) -> bool:
        """A block that was encoded once gives other tokens from now on."""
        encoded = sorted(gen.encoded)
        if not encoded or self.world.epochs != 1:
            return False
        self.other_tokens.add(encoded[int(arg * len(encoded))])
        return True

    def _end_consumer(self, gen: Generation, kind: str, arg: float) -> bool:
        consumer = gen.children.get(CONSUMER)
        if consumer is None or not consumer.alive:
            return False
        if kind == "stop":
            if not gen.ready or gen.stopping:
                return False
            gen.stopping = True
            consumer.inbox.append(Stop("asked to stop"))
        elif kind == "consumer_killed":
            consumer.die()
        elif kind == "consumer_stall":  # far longer than a worker may be silent
            consumer.stalled_until = self.now + (1 + 3 * arg) * HANG_S
        else:
            consumer.doom = "midway"
        return True

    def _cut_off(self, kind: str, arg: float) -> None:
        """What the next generation finds, when this one is cut off."""
        if kind == "rewind" and self.durable:
            self.durable.pop()
            if not self.world.writer:
                self.disk.add(-self.world.checkpoint_bytes)
        elif kind == "lose_cache":
            for shard in sorted(self.disk.whole):
                if arg * 3 % 1 < 0.5:
                    self.disk.evict(shard)
