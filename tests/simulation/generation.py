"""One simulated generation: the supervisor's shell as pipeline/generation.py has it, in a world
where everything that can happen next is equally allowed to.

The real scheduler decides; this shell delivers messages, starts, kills and deletes, and compares
every step with what the models of disk, ring, slots and stream know on their own.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import FinewebError
from pipeline.messages import (
    BlockFilled,
    CheckpointGranted,
    CheckpointWanted,
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    Cursor,
    CursorIs,
    CursorWanted,
    Encode,
    Encoded,
    Fetch,
    FetchFailed,
    FetchProgress,
    FillBlock,
    Hello,
    LaneEnded,
    Message,
    Place,
    Placed,
    ShardEnded,
    ShardFetched,
    ShardUnreadable,
    SlotPublished,
    Stop,
)
from pipeline.scheduler import CONSUMER, Scheduler
from pipeline.state import Command, Evict, Kill, Note, Send, Spawn
from tests.simulation import checks
from tests.simulation.consumer import Consumer
from tests.simulation.matter import Violation
from tests.simulation.processes import KINDS, Process

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

_SLOWNESS = {"fetcher": 0, "decompressor": 1, "tokenizer": 2, CONSUMER: 3}
_STEP_S = 0.01
_WORK = (Fetch, FillBlock, Encode, Place)
_ANSWERS = (
    ShardFetched, FetchFailed, BlockFilled, ShardEnded, ShardUnreadable, Encoded, Placed,
)  # fmt: skip


class Ended(Exception):  # noqa: N818 - a generation ends in many ways, few are errors
    """The generation is over."""


class Generation:
    """From a cursor to an end.

    Args:
        sim: The world in motion; what outlives the generation stands there.
        cursor: Where to begin.
        checkpoint_bytes: What the supervisor knows of checkpoints.
    """

    def __init__(self, sim: Simulation, cursor: Cursor, checkpoint_bytes: int | None) -> None:
        self.sim, self.base = sim, cursor
        self.known, self.found = checkpoint_bytes, {**sim.disk.partial, **sim.disk.whole}
        self.scheduler = Scheduler(sim.plan(cursor), checkpoint_bytes)
        self.children: dict[str, Process] = {}
        self.order: list[Process] = []
        self.spawns: list[tuple[float, int, Spawn]] = []
        self.ready = self.stopping = self.failed = False
        self.error: FinewebError | None = None
        self.done: ConsumerDone | None = None
        self.outstanding: Counter[str] = Counter()  # worker → work it was sent, unanswered
        self.todo: dict[str, deque[tuple[int, int]]] = {}  # worker → (shard, block) in hand
        self.fetching: dict[int, str] = {}  # shard → fetcher
        self.blocks: dict[int, tuple[int, int, int, int]] = {}  # id → lane, sequence, number, shard
        self.slot_of: dict[int, int] = {}  # block id → text slot
        self.row: Counter[str] = Counter()  # deaths of a worker without an answer in between
        self.bad_records = cursor.counts.bad_records
        self.num_skips = len(cursor.skips)
        self.encoded: set[tuple[int, int]] = set()

    # ── the loop ────────────────────────────────────────────────────────────────────────────

    def run(self, complete: dict[int, tuple[str, int]], begun: dict[int, int]) -> None:
        """Until the consumer is done, or the generation is cut off.

        Raises:
            Ended: the supervisor or the consumer is no more.
        """
        sim = self.sim
        self._add(Consumer(sim, [lane.position for lane in self.base.lanes], sim.world.slow[3]))
        self._guarded(lambda: self.scheduler.start(complete, begun))
        while self.done is None and not (self.failed and not self.ready):
            sim.tick(self)
            sim.now += _STEP_S
            while self.spawns and self.spawns[0][0] <= sim.now:
                self._spawn(heapq.heappop(self.spawns)[2])
            if sim.random() < 0.02:
                self._time()
            if not self._act():
                self._idle()

    def _guarded(self, decide: Callable[[], list[Command]], *, settled: bool = True) -> None:
        """Let the scheduler decide, carry it out, and look at what it has led to."""
        try:
            commands = decide()
        except FinewebError as error:
            self._skips()  # one shard may have been left out before the next was too many
            checks.explained(self, error)
            self.error, self.failed = error, True
            if self.ready and CONSUMER in self.children:
                self.children[CONSUMER].inbox.append(Stop(error.what))
            self.sim.log("error", error.what)
            return
        self._skips()
        self._carry_out(commands)
        checks.after_event(self)
        if settled:
            checks.work_conserving(self)

    def _act(self) -> bool:
        """Somebody does something: which of those who can is the world's choice."""
        order, random, patience = self.order, self.sim.random, 1 / self.sim.world.slow[4]
        n = 2 * len(order)
        begin = int(random() * n)
        late: Process | None = None  # could act, and was too slow
        for at in range(begin, begin + n):
            child = order[(at >> 1) % len(order)]
            if at & 1:
                if child.outbox or not child.alive:
                    if random() < patience:
                        self._receive(child)
                        return True
                    late = child
            elif child.can_step():
                if random() < child.speed:
                    child.step()
                    return True
                late = child
        if late is None:
            return False
        if late.can_step():
            late.step()
        else:
            self._receive(late)
        return True

    def _idle(self) -> None:
        """Nobody can do anything: only time can help, or never will."""
        sim = self.sim
        due = [at for at, _, _ in self.spawns[:1]]
        due += [f.not_before for f in self.scheduler.state.files if f.not_before > sim.now]
        for child in self.order:
            if child.alive and child.hung:
                due.append(sim.now + 2)
            elif child.alive and child.stalled_until > sim.now:
                due.append(child.stalled_until)
        if due:
            sim.now = max(sim.now, min(due) + _STEP_S)
        self._time()
        if not due and not self.spawns and not any(c.outbox or c.can_step() for c in self.order):
            raise Violation("deadlock: nothing is on its way, and the reader waits")

    def _time(self) -> None:
        if not self.failed:
            self._guarded(lambda: self.scheduler.on_time(self.sim.now))

    # ── processes ───────────────────────────────────────────────────────────────────────────

    def _add(self, child: Process) -> None:
        self.children[child.name] = child
        self.order.append(child)
        self.todo[child.name] = deque()

    def _spawn(self, command: Spawn) -> None:
        slowness = self.sim.world.slow[_SLOWNESS[command.role]]
        child = KINDS[command.role](self.sim, command.worker, slowness)
        if self.sim.hang_next:
            self.sim.hang_next, child.hung = False, True
        self._add(child)

    def _receive(self, child: Process) -> None:
        """The next message of a process, or its end."""
        if child.outbox:
            message = child.outbox.popleft()
            self.sim.log(child.name, message)
            self.sim.events += 1
            if child.name == CONSUMER:
                self._handle_consumer(message)
            elif not self.failed:
                self._before(child.name, message)
                now = self.sim.now
                decide = partial(self.scheduler.on_message, child.name, message, now)
                self._guarded(decide, settled=not isinstance(message, FetchProgress))
            return
        del self.children[child.name]
        self.order.remove(child)
        self.sim.log(child.name, "died")
        self.sim.events += 1
        if child.name == CONSUMER:
            raise Ended("the consumer died")
        if not self.failed:
            self._bury(child)
            now = self.sim.now
            self._guarded(lambda: self.scheduler.on_death(child.name, "signal 9", now))
            if self.row[child.name] > self.scheduler.state.plan.max_restarts and not self.failed:
                raise Violation(f"{child.name} died {self.row[child.name]} times for nothing")

    def _bury(self, child: Process) -> None:
        """What its death means to the models: its work is undone, and may be to blame."""
        name = child.name
        self.sim.slots.worker_died(name)
        self.outstanding[name] = 0
        if not child.unwanted:
            self.row[name] += 1
            for shard, _ in self.todo[name]:
                self.sim.blame[shard] += 1
        for shard in [s for s, fetcher in self.fetching.items() if fetcher == name]:
            del self.fetching[shard]

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def _before(self, name: str, message: Message) -> None:
        """Keep the models' books: a message that the scheduler is about to hear."""
        sim, slots = self.sim, self.sim.slots
        if isinstance(message, _ANSWERS):
            self.outstanding[name] -= 1
            self.row[name] = 0
        match message:
            case ShardFetched(shard=shard):
                del self.fetching[shard]
                self.todo[name].clear()
            case FetchFailed(shard=shard):
                del self.fetching[shard]
                self.todo[name].clear()
                sim.blame[shard] += 0 if message.disk_full else 3
            case BlockFilled():
                run = self.scheduler.filling._streams[message.stream]
                slots.lent[message.slot] = ("block", (run.lane, run.sequence, message.block))
                self.todo[name].popleft()
                place = run.lane, run.sequence, message.block
                rest = any(s[:2] == place[:2] and s[2] <= place[2] and s[3] for s in sim.skips)
                if rest or (*place, False) in sim.skips:
                    slots.give_back(message.slot)
                self.bad_records += 0 if rest else message.num_bad
            case ShardEnded():
                run = self.scheduler.filling._streams[message.stream]
                slots.give_back(message.slot)
                self.todo[name].popleft()
                self.bad_records += 0 if run.ended else message.num_bad  # left out meanwhile
            case ShardUnreadable():
                slots.give_back(message.slot)
                shard = self.todo[name].popleft()[0]
                sim.blame[shard] += 1 if message.cache_damaged else 3
            case Encoded(block=block):
                _, _, number, shard = self.blocks[block]
                self.encoded.add((shard, number))
            case Placed():
                _, _, number, shard = self.blocks[message.block]
                if message.first + message.count == sim.world.shards[shard].blocks[number].tokens:
                    slots.give_back(self.slot_of[message.block])
                    self.todo[name].remove((shard, number))

    def _handle_consumer(self, message: Message) -> None:
        consumer = self.children[CONSUMER]
        match message:
            case Hello() | CheckpointWritten():
                pass
            case ConsumerReady(checkpoint_bytes=size):
                self.ready = True
                if not self.failed:
                    total = size * (self.sim.world.kept + 1)
                    self._guarded(lambda: self.scheduler.on_checkpoint_bytes(total))
            case CursorWanted(request=request, positions=positions):
                cursor = self.scheduler.cursor(positions, self.base)
                checks.cursor(self, positions, cursor)
                consumer.inbox.append(CursorIs(request, cursor))
            case CheckpointWanted(request=request, size_bytes=size):
                if size * (self.sim.world.kept + 1) > (self.scheduler.state.checkpoint_bytes or 0):
                    if self.failed:
                        raise Ended("the budget is too small for a checkpoint")
                    raise Violation("a checkpoint is larger than what was set aside")
                consumer.inbox.append(CheckpointGranted(request))
            case ConsumerDone():
                self.done = message
            case _:
                if not self.failed:
                    now = self.sim.now
                    self._guarded(lambda: self.scheduler.on_message(CONSUMER, message, now))

    # ── commands ────────────────────────────────────────────────────────────────────────────

    def _skips(self) -> None:
        """New skips: allowed, with a cause, and of nothing that was given away before."""
        skips = self.scheduler.state.skips
        for skip in skips[self.num_skips :]:
            self.sim.log("skip", skip)
            self.sim.skips.add((skip.lane, skip.sequence, skip.block, skip.rest))
            checks.skip(self, skip)
            lent = ("block", (skip.lane, skip.sequence, skip.block))
            for slot in [s for s, why in self.sim.slots.lent.items() if why == lent]:
                self.sim.slots.give_back(slot)
        self.num_skips = len(skips)

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if not isinstance(command, Note):
                self.sim.log("  →", command)
            match command:
                case Send(worker=worker, message=message):
                    self._send(worker, message)
                case Spawn(worker=worker, delay_s=delay):
                    if worker in self.children:
                        raise Violation(f"{worker} is started, and lives")
                    heapq.heappush(self.spawns, (self.sim.now + delay, self.sim.count(), command))
                case Kill(worker=worker, reason=reason):
                    if worker not in self.children:
                        raise Violation(f"{worker} is to be killed, and is dead")
                    child = self.children[worker]
                    child.unwanted = not reason.startswith("silent")
                    checks.hang(child, child.unwanted)
                    child.die()
                case Evict(shard=shard):
                    if shard in self.fetching:
                        raise Violation(f"shard {shard} is deleted under its fetcher")
                    self.sim.disk.evict(shard)

    def _send(self, worker: str, message: Message) -> None:
        if worker not in self.children:
            raise Violation(f"{type(message).__name__} for {worker}, which is known to be dead")
        child = self.children[worker]
        if isinstance(message, _WORK):
            self.outstanding[worker] += 1
        match message:
            case Fetch(shard=shard):
                if shard in self.fetching:
                    raise Violation(f"shard {shard} is fetched twice at once")
                self.fetching[shard] = worker
                self.todo[worker].append((shard, -1))
            case FillBlock(stream=stream, slot=slot):
                self.sim.slots.lend(slot, worker)
                run = self.scheduler.filling._streams[stream]
                self.todo[worker].append((run.shard, run.next_block))
            case Encode(block=block, slot=slot):
                kind, what = self.sim.slots.lent.get(slot, ("nothing", None))
                if kind != "block":
                    raise Violation(f"block {block} is to be read from slot {slot}: {kind}")
                shard, number = self.sim.slots.content[slot]
                self.blocks[block] = (*what[:2], number, shard)  # type: ignore[index]
                self.slot_of[block] = slot
                self.todo[worker].append((shard, number))
            case SlotPublished():
                checks.published(self, message)
            case LaneEnded():
                checks.lane_ended(self, message)
        if child.alive:
            child.inbox.append(message)
