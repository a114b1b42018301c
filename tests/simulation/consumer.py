"""The simulated consumer: reads in the trainer's order or the writer's, saves, stops, dies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from pipeline.messages import (
    CheckpointGranted,
    CheckpointWanted,
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    Cursor,
    CursorIs,
    CursorWanted,
    Hello,
    LaneEnded,
    Message,
    SlotPublished,
    SlotReleased,
    Stop,
)
from pipeline.reading import NOT_YET, Reading
from tests.simulation.matter import Violation
from tests.simulation.processes import Died, Process

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation


class Consumer(Process):
    """Trainer or writer. What it reads next is pipeline/reading.py's to say, but for whose turn it
    is: the data set that is furthest behind its weight."""

    role = "consumer"

    def __init__(self, sim: Simulation, positions: list[int], slowness: int) -> None:
        super().__init__(sim, "consumer", slowness)
        world = sim.world
        self.writer = world.writer
        self.reading = Reading(
            positions, world.seq_len, sim.ring.C, writer=world.writer, due=self.due
        )
        self.committed = list(positions)  # consumed by whole updates
        self.reads = 0
        self.stop = False
        self.saving = ""  # cursor, bytes, write: what it waits for or does
        self.cursor: Cursor | None = None
        self.then_done = False
        self.complete = False
        self.finished = False

    def boot(self) -> None:
        world = self.sim.world
        self.sim.disk_clean_checkpoints()
        self.send(Hello(self.role, 0))
        self.send(ConsumerReady(0 if self.writer else world.checkpoint_bytes, {}))

    # ── what comes next ─────────────────────────────────────────────────────────────────────

    def busy(self) -> bool:
        if self.finished:
            return False
        if self.saving:
            return self.saving == "write"
        return self.stop or self.reading.next_lane() != NOT_YET

    def due(self, positions: Sequence[int]) -> range:
        """The lanes of the data set whose turn it is."""
        lanes, first = [], 0
        for one in self.sim.world.sets:
            members = range(first, first + one.lanes)
            windows = sum(positions[lane] // self.sim.world.seq_len for lane in members)
            lanes.append((Fraction(2 * windows + 1, 2 * one.weight), first, members))
            first += one.lanes
        return min(lanes)[2]

    def will_starve(self, unsent: Iterable[Message]) -> bool:
        """Whether it frees no slot any more, though it reads all that was published. Lanes that
        have ended do not count: all that is theirs has left the disk.

        Args:
            unsent: What the scheduler has said and the shell has not sent.
        """
        ahead = self.reading.copy()
        for message in (*self.inbox, *unsent):
            if isinstance(message, SlotPublished | LaneEnded):
                ahead.take(message)
        freed = {message.lane for message in self.outbox if isinstance(message, SlotReleased)}
        while (lane := ahead.next_lane()) is not None and lane != NOT_YET:
            read = ahead.read(lane)
            if read.end // ahead.C > read.begin // ahead.C:
                freed.add(lane)
        return all(ahead.ends[lane] is not None for lane in freed)

    def work(self) -> None:
        if self.saving == "write":
            self._write()
            return
        lane = None if self.stop else self.reading.next_lane()
        enough = self.sim.world.stop_after
        if lane is None or (enough is not None and self.sim.updates >= enough):
            self.complete = not self.stop
            self.then_done = True
            if self.complete:
                self.committed = list(self.reading.positions)
            self._save()
            return
        self._read(lane)

    def _read(self, lane: int) -> None:
        _, begin, end, frees = self.reading.read(lane)
        self._check(lane, begin, end if self.writer else end + 1)
        if frees is not None:
            self._release(frees)
        self.reads += 1
        if self.reads % self.sim.world.update_windows == 0:
            self.committed = list(self.reading.positions)
            self.sim.updates += 1
            if self.sim.updates % self.sim.world.checkpoint_every == 0:
                self._save()

    def _check(self, lane: int, begin: int, end: int) -> None:
        """What is read is the stream, at the moment at which it is read."""
        got = self.sim.ring.read(lane, begin, end)
        want = self.sim.streams[lane].upto(end)[begin:end]
        if got != want:
            raise Violation(f"lane {lane}, {begin} to {end}: read {got}, the stream is {want}")

    def _release(self, message: SlotReleased) -> None:
        if self.sim.ring.released[message.lane] != message.slot:
            raise Violation(f"lane {message.lane}: slot {message.slot} is released out of turn")
        self.sim.ring.released[message.lane] += 1
        self.send(message)

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────

    def _save(self) -> None:
        self.saving = "cursor"
        self.send(CursorWanted(1, tuple(self.committed)))

    def _write(self) -> None:
        """Write the checkpoint, make it durable, drop the oldest."""
        sim = self.sim
        assert self.cursor is not None
        size = 0 if self.writer else sim.world.checkpoint_bytes
        if not sim.unfinished_checkpoint:
            sim.unfinished_checkpoint = size
            sim.disk.add(size)
            if size:
                return
        if self.midway():
            raise Died
        sim.unfinished_checkpoint = 0
        sim.durable.append(self.cursor)
        if len(sim.durable) > sim.world.kept:
            sim.durable.pop(0)
            sim.disk.add(-size)
        self.saving = ""
        if not self.writer:
            self.send(CheckpointWritten(1, "", size, self.cursor))
        if self.then_done:
            self.finished = True
            self.send(ConsumerDone(self.complete, {}))

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def take(self, message: Message) -> None:
        match message:
            case SlotPublished() | LaneEnded():
                self.reading.take(message)
            case CursorIs(cursor=cursor):
                self.cursor, self.saving = cursor, "write"
                if not self.writer:
                    self.saving = "bytes"
                    self.send(CheckpointWanted(2, self.sim.world.checkpoint_bytes))
            case CheckpointGranted():
                self.saving = "write"
            case Stop():
                self.stop = True
            case _:
                raise Violation(f"the consumer got {message!r}")
