"""The decisions: events in, commands out; no clock, no file, no process.

Runs in: supervisor, simulation and planner. Pure.

The supervisor feeds what happened (a worker's message, its start, its death, time) and carries
out the commands in order. After every event the three stages run until nothing more is enabled,
so an idle pipeline is one that has nothing to do; if it is idle and the reader still waits, the
scheduler says so instead of waiting for ever.
"""

from __future__ import annotations

import math

from pipeline.errors import FinewebError, WorkerCrashError
from pipeline.fetching import Fetching
from pipeline.filling import Filling
from pipeline.messages import (
    BlockFilled,
    Counts,
    Cursor,
    Encoded,
    FetchFailed,
    FetchProgress,
    Hello,
    LaneCursor,
    Message,
    Placed,
    ReserveMore,
    ShardEnded,
    ShardFetched,
    ShardUnreadable,
    SlotReleased,
    Working,
)
from pipeline.placing import CONSUMER, Placing
from pipeline.state import Command, File, FileState, Kill, Lane, Plan, Spawn, State, Worker
from pipeline.turns import Turns, one_group

_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 5.0
_MAX_PASSES = 1000  # every pass but the last decides something; after an event two or three do
_BUG = "this is a bug: please report it with log.txt"


class Scheduler:
    """One generation of the stream: from a cursor on, with fresh workers and an empty ring.

    Args:
        plan: Everything that is fixed.
        checkpoint_bytes: Bytes to set aside for checkpoints, or None if the consumer has yet to
            say (nothing is fetched ahead until then).
    """

    def __init__(self, plan: Plan, checkpoint_bytes: int | None) -> None:
        start = plan.cursor.lanes if plan.cursor else (LaneCursor(0, 0, 0, 0),) * plan.lanes.lanes
        C = plan.ring.slot_tokens
        self.state = State(
            plan=plan,
            lanes=[
                Lane(
                    index=index,
                    begin=at,
                    next_sequence=at.sequence,
                    position=at.position - at.token,
                    placed=at.position,
                    released=at.position // C,
                    published=at.position // C,
                )
                for index, at in enumerate(start)
            ],
            files=[File(shard) for shard in range(len(plan.shards))],
            workers={
                f"{role}-{number}": Worker(f"{role}-{number}", role)
                for role, count in plan.workers.items()
                for number in range(count)
            },
            free_slots=list(range(plan.text_slots)),
            checkpoint_bytes=checkpoint_bytes,
            skips=list(plan.cursor.skips) if plan.cursor else [],
        )
        self.state.bad_shards = len(self.state.skips)
        self.fetching = Fetching(self.state)
        self.filling = Filling(self.state, self.fetching)
        self.placing = Placing(self.state, self.fetching, self.filling)
        for lane, at in zip(self.state.lanes, start, strict=True):
            self.filling.extend(lane)
            if lane.runs:
                run = lane.runs[0]
                run.next_block = run.positioned = at.block
                run.place = at.place
                if run.end_block is not None:
                    run.leave_out(run.end_block)

    # ── events ──────────────────────────────────────────────────────────────────────────────

    def start(
        self,
        complete: dict[int, tuple[str, int]],
        partial: dict[int, int],
    ) -> list[Command]:
        """Begin: take over what the cache holds (Fetching.adopt) and start all workers."""
        self.fetching.check_budget(self.state.checkpoint_bytes or 0)
        self.fetching.adopt(complete, partial)
        for worker in self.state.workers.values():
            self.state.emit(Spawn(worker.name, worker.role))
        return self._settle()

    def on_checkpoint_bytes(self, size_bytes: int) -> list[Command]:
        """The consumer has said what its checkpoints need.

        Raises:
            BudgetError: the budget is too small for them.
        """
        self.fetching.confirm(size_bytes)
        return self._settle()

    def on_message(self, name: str, message: Message, now: float) -> list[Command]:
        """A worker's message. Messages that are not for the scheduler are a bug."""
        state = self.state
        state.now = now
        if isinstance(message, SlotReleased):
            self.placing.released(message)
            return self._settle()
        worker = state.workers[name]
        worker.heard = now
        match message:
            case Hello():
                worker.ready = True
            case Working():
                return []
            case FetchProgress():
                self.fetching.progress(worker, message)
                return []
            case ReserveMore():
                self.fetching.reserve_more(worker, message)
            case ShardFetched():
                self.fetching.fetched(worker, message)
            case FetchFailed():
                self.fetching.failed(worker, message)
            case BlockFilled():
                self.filling.filled(worker, message)
            case ShardEnded():
                self.filling.ended(worker, message)
            case ShardUnreadable():
                self.filling.unreadable(worker, message)
            case Encoded():
                self.placing.encoded(worker, message)
            case Placed():
                self.placing.placed(worker, message)
            case _:
                raise TypeError(f"{name} sent {type(message).__name__}")
        return self._settle()

    def on_death(self, name: str, how: str, now: float) -> list[Command]:
        """A worker is dead (waited for: it cannot write any more): its work goes to others."""
        state = self.state
        state.now = now
        worker = state.workers[name]
        deaths = worker.deaths + (not worker.killed)
        if worker.work:
            worker.work = 1
            state.answered(worker)  # ends its busy time
        match worker.role:
            case "fetcher":
                self.fetching.died(worker)
            case "decompressor":
                self.filling.died(worker)
            case "tokenizer":
                self.placing.died(worker)
        state.note("worker_died", level="warning", who=name, how=how)
        wanted, worker.killed = worker.killed, False
        worker.deaths = deaths
        worker.ready, worker.heard = False, math.inf  # its start is timed from the next look on
        worker.restarts += 1
        if worker.deaths > state.plan.max_restarts:
            state.fail(
                WorkerCrashError(
                    f"{name} died {worker.deaths} times without finishing anything, the last time "
                    f"by {how}",
                    "see log.txt",
                )
            )
        delay = min(_BACKOFF_S * 2 ** max(0, worker.deaths - 1), _MAX_BACKOFF_S)
        state.emit(Spawn(name, worker.role, 0.0 if wanted else delay))
        return self._settle()

    def on_time(self, now: float) -> list[Command]:
        """Time has passed: find workers that hang, at work or at their start, and try again what
        was put off."""
        state = self.state
        state.now = now
        for worker in state.workers.values():
            waits = worker.file is not None and worker.file.wants_more
            due = (worker.work and not waits) or not worker.ready
            worker.heard = min(worker.heard, now)
            silent = now - worker.heard
            if due and not worker.killed and silent > state.plan.hang_s:
                reason = f"silent for {silent:.0f} s " + (
                    "with work" if worker.ready else "at start"
                )
                worker.heard = now  # its death counts against what it works on
                state.note("worker_hangs", level="warning", who=worker.name, reason=reason)
                state.emit(Kill(worker.name, reason))
        return self._settle()

    def on_disk_full(self, now: float) -> list[Command]:
        """A checkpoint has met a full disk: it comes before anything fetched ahead."""
        self.state.now = now
        self.fetching.pause()
        return self._settle()

    def cursor(self, positions: tuple[int, ...], base: Cursor) -> Cursor:
        """See Placing.cursor."""
        return self.placing.cursor(positions, base)

    def shards_at(self, cursor: Cursor) -> tuple[str, ...]:
        """Names of the shards that the lanes stand in; '' for a lane that has ended."""
        plan = self.state.plan
        turns = [plan.lanes.turn(lane, at.sequence) for lane, at in enumerate(cursor.lanes)]
        return tuple("" if turn is None else plan.shards[turn.shard].name for turn in turns)

    def totals(self) -> Counts:
        """Totals over everything that has got a position, earlier generations included."""
        cursor = self.state.plan.cursor
        return self.placing.totals(cursor.counts if cursor else Counts())

    # ── until nothing more is enabled ───────────────────────────────────────────────────────

    def _settle(self) -> list[Command]:
        """Run the stages until they add no command, and return all commands.

        Raises:
            FinewebError: the run cannot go on.
        """
        commands = self.state.commands
        before, passes = -1, 0
        while len(commands) != before and self.state.failure is None:
            before, passes = len(commands), passes + 1
            self.placing.advance()
            self.fetching.assign()
            self.filling.assign()
            self.placing.assign()
            if passes > _MAX_PASSES:
                what = f"the decisions come to no rest: the last of them was {commands[-1]}"
                self.state.fail(FinewebError(what, _BUG))
        if self.state.failure is None:
            self._check_not_stuck()
        if self.state.failure is not None:
            raise self.state.failure
        taken, self.state.commands = commands, []
        return taken

    def _check_not_stuck(self) -> None:
        """Idle implies that the ring is full or the stream has ended."""
        state = self.state
        if not state.confirmed or state.disk_full_until > state.now:
            return
        for worker in state.workers.values():
            growing = worker.file is not None and worker.file.wants_more
            if not worker.ready or worker.killed or (worker.work and not growing):
                return
        if any(file.not_before > state.now for file in state.files_in_use()):
            return
        C, slots = state.plan.ring.slot_tokens, state.plan.ring.slots
        for lane in state.lanes:
            if lane.end is None and lane.placed < (lane.released + slots) * C:
                starving = self.fetching.starving()
                if starving is None:
                    what = f"lane {lane.index} is stuck at position {lane.placed}"
                    state.fail(FinewebError(what, _BUG))
                elif self._reader_waits():  # else it frees slots, and shards with them
                    state.fail(starving)
                return

    def _reader_waits(self) -> bool:
        """Whether the reader has read what it can: it takes windows by the rule of turns.py, so a
        lane with nothing to read says how far it can have come in the others."""
        T, C = self.state.plan.seq_len, self.state.plan.ring.slot_tokens
        groups = self.state.plan.groups or one_group(len(self.state.lanes))
        turns = Turns(groups, T)
        owned = self.state.plan.owned or range(len(self.state.lanes))
        # other ranks' lanes count as endless: then nobody is thought to wait who does not
        most: list[int | None] = [None] * sum(group.lanes for group in groups)
        for lane in self.state.lanes:
            most[owned[lane.index]] = None if lane.end is None else max(0, lane.end - 1) // T
        going = [lane for lane in self.state.lanes if lane.end is None]
        dry = [lane for lane in going if lane.published == lane.released]
        for lane in dry:
            turn = max(lane.base, lane.released * C) // T
            reached = turns.reached(owned[lane.index], turn, most)
            if all(other in dry or other.released >= reached[owned[other.index]] * T // C
                   for other in going):  # fmt: skip
                return True
        return False

    # ── what is shown ───────────────────────────────────────────────────────────────────────

    def limiting(self) -> str:
        """The stage that the emptiest lane waits for: 'fetch', 'decompress', 'tokenize', or
        'consumer' if every lane has slots to read."""
        state = self.state
        C = state.plan.ring.slot_tokens
        hungry = [
            lane
            for lane in state.lanes
            if lane.published == lane.released and (lane.end is None or lane.placed < lane.end)
        ]
        if not hungry:
            return "consumer"
        lane = min(hungry, key=lambda lane: lane.placed - lane.released * C)
        run = lane.runs[0] if lane.runs else None
        if run is None or state.files[run.shard].state is not FileState.CACHED:
            return "fetch"
        return "tokenize" if run.blocks else "decompress"


__all__ = ["CONSUMER", "Scheduler"]
