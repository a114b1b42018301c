"""The invariants, checked after every event of a simulated generation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pipeline.errors import (
    BadRecordsError,
    BudgetError,
    FinewebError,
    ShardError,
    SourceError,
    WorkerCrashError,
)
from pipeline.messages import Cursor, LaneEnded, Skip, SlotPublished
from pipeline.scheduler import CONSUMER
from pipeline.state import FileState, Lane, Send, State, Worker
from tests.simulation.matter import Violation

if TYPE_CHECKING:
    from tests.simulation.consumer import Consumer
    from tests.simulation.generation import Generation
    from tests.simulation.processes import Process


def after_event(gen: Generation) -> None:
    """Bytes, slots and work add up, and nobody is idle who could work."""
    state, sim = gen.scheduler.state, gen.sim
    reserved = 0
    for file in state.files:
        reserved += file.reserved_bytes if state.plan.shards[file.shard].local_path is None else 0
        if sim.disk.size(file.shard) > file.reserved_bytes:
            raise Violation(
                f"shard {file.shard}: {sim.disk.size(file.shard)} bytes on disk, "
                f"{file.reserved_bytes} reserved"
            )
    taken = reserved + sim.world.fixed_bytes + (state.checkpoint_bytes or 0)
    if taken > sim.disk.budget:
        raise Violation(f"{taken} bytes reserved, the budget is {sim.disk.budget}")
    if len(state.free_slots) + len(sim.slots.lent) != sim.slots.count:
        raise Violation(
            f"text slots: {len(state.free_slots)} free, {len(sim.slots.lent)} lent, "
            f"of {sim.slots.count}"
        )
    for worker in state.workers.values():
        if worker.work != gen.outstanding[worker.name]:
            raise Violation(
                f"{worker.name} has {gen.outstanding[worker.name]} pieces of work, the scheduler "
                f"believes {worker.work}"
            )
    if gen.bad_records > state.plan.max_bad_records:
        raise Violation(f"{gen.bad_records} bad records, and the run goes on")


def work_conserving(gen: Generation) -> None:
    """No worker is idle while there is work that neither budget nor slots forbid."""
    state = gen.scheduler.state
    able = [worker for worker in state.workers.values() if worker.ready]
    if gen.scheduler.filling.pending:
        _nobody(able, "tokenizer", lambda w: len(w.queue) < 2, "a block is to be encoded")
    opens = gen.scheduler.filling._open_ahead if state.confirmed else 1
    keep = sum(not _holds(lane) for lane in state.lanes if lane.head)
    for lane in state.lanes:
        for depth, run in enumerate(lane.runs):
            file = state.files[run.shard]
            if run.ended or (depth and not state.confirmed):
                continue
            what = f"shard {run.shard}, {depth} ahead in lane {lane.index}, is to be"
            if not run.attached:
                doomed = file.worker is not None and state.workers[file.worker].killed
                if depth == 0 and not doomed and gen.sim.world.shards[run.shard].listed is not None:
                    raise Violation(f"{what} read now, and gets no bytes")
            elif file.state is FileState.ABSENT:
                if file.not_before <= state.now:
                    _nobody(able, "fetcher", lambda w: w.file is None, f"{what} fetched")
            elif file.state is FileState.CACHED and depth < opens:
                if run.worker is None:
                    _nobody(able, "decompressor", lambda w: True, f"{what} opened")
                elif run.filling is None:
                    mine = int(run is lane.head and not _holds(lane))
                    if len(state.free_slots) > keep - mine and not state.workers[run.worker].fills:
                        raise Violation(f"{what} read, its decompressor is idle, a slot is free")
    _prefetches(gen, state)


def _nobody(able: list[Worker], role: str, idle: Callable[[Worker], bool], what: str) -> None:
    for worker in able:
        if worker.role == role and idle(worker):
            raise Violation(f"{what}, and {worker.name} is idle")


def _holds(lane: Lane) -> bool:
    """Whether a lane can go on with the text slots that it has."""
    head = lane.head
    upto = lane.next_sequence if head is None else head.sequence
    return any(
        (run.filling is not None or run.blocks) and run.sequence <= upto for run in lane.runs
    )


def _prefetches(gen: Generation, state: State) -> None:
    """The first shard ahead that has no bytes would not fit, by this sum of our own."""
    if not state.confirmed or state.growing():
        return
    ahead = [
        (depth, lane.index, run)
        for lane in state.lanes
        for depth, run in enumerate(lane.runs)
        if depth and not run.ended and not run.attached
    ]
    if not ahead or any(not lane.runs[0].attached for lane in state.lanes if lane.runs):
        return
    run = min(ahead, key=lambda one: one[:2])[2]
    world = gen.sim.world
    file = state.files[run.shard]
    if file.worker is not None and state.workers[file.worker].killed:
        return  # it has to go before it can come again
    taken = world.fixed_bytes + (state.checkpoint_bytes or 0)
    taken += world.floor * sum(1 for lane in state.lanes if lane.runs or not lane.finished)
    currents = {(lane.index, lane.runs[0].sequence) for lane in state.lanes if lane.runs}
    for other in state.files:
        only_current = other.users and other.users <= currents
        if not world.shards[other.shard].local and other is not file:
            have = other.reserved_bytes
            taken += max(0, have - world.floor) if only_current else have
    size = world.shards[run.shard].listed
    step = max(world.step_bytes, file.needs_bytes)
    want = file.reserved_bytes or (step if size is None else size)
    if world.shards[run.shard].local or taken + want <= gen.sim.disk.budget:
        raise Violation(f"shard {run.shard} would fit ({taken} + {want} bytes), and is not fetched")


def hang(child: Process, unwanted: bool) -> None:
    """A worker that is killed for its silence has been silent, with something to do."""
    if not unwanted and child.alive and not (child.hung or child.can_step() or child.stalled()):
        raise Violation(f"{child.name} is killed for a hang, and had nothing to do")


# ── the stream ──────────────────────────────────────────────────────────────────────────────


def published(gen: Generation, message: SlotPublished) -> None:
    """What the reader may now read is the stream; it stands in the ring."""
    ring, lane = gen.sim.ring, message.lane
    C = ring.C
    begin = max(message.slot * C, gen.base.lanes[lane].position)
    if not message.slot * C <= ring.valid[lane] <= (message.slot + 1) * C + 1:
        raise Violation(f"lane {lane}: slot {message.slot} is published out of turn")
    if begin >= message.end:
        raise Violation(f"lane {lane}: nothing new is published in slot {message.slot}")
    want = gen.sim.streams[lane].upto(message.end)[begin : message.end]
    got = ring.read(lane, begin, message.end)
    if got != want:
        raise Violation(
            f"lane {lane}, {begin} to {message.end}: published {got}, the stream is {want}"
        )
    ring.valid[lane] = message.end


def lane_ended(gen: Generation, message: LaneEnded) -> None:
    """The lane's length is right."""
    end = gen.sim.streams[message.lane].end()[0]
    if message.end != end:
        raise Violation(f"lane {message.lane} ends at {message.end}, the stream at {end}")


def cursor(gen: Generation, positions: tuple[int, ...], made: Cursor) -> None:
    """It names exactly these tokens, and counts exactly what comes before their blocks."""
    totals = [0] * 5
    for lane, position in enumerate(positions):
        at = made.lanes[lane]
        mark = gen.sim.streams[lane].mark(at.sequence, at.block)
        if mark is None or mark[0] + at.token != position or at.position != position:
            raise Violation(f"lane {lane}: {at} is made for position {position}, and is at {mark}")
        for part in range(5):
            totals[part] += mark[part + 1]
    counts = made.counts
    counted = [*msgspec.structs.astuple(counts)]
    if counted != totals:
        raise Violation(f"the cursor counts {counted}, the stream has {totals}")
    skips = {(s.lane, s.sequence, s.block, s.rest) for s in made.skips}
    if skips != gen.sim.skips:
        raise Violation(f"the cursor has the skips {skips}, the run {gen.sim.skips}")


def complete(gen: Generation) -> None:
    """The consumer has had everything, and the totals say what; of several data sets, all of the
    one whose turn it is."""
    consumer: Consumer = gen.children[CONSUMER]  # type: ignore[assignment]
    want = [0] * 5
    due = consumer.due(consumer.reading.positions)
    for lane, position in enumerate(consumer.reading.positions):
        mark = gen.sim.streams[lane].end()
        left = mark[0] - position
        if lane in due and (left if gen.sim.world.writer else left > gen.sim.world.seq_len):
            raise Violation(f"lane {lane}: complete, and {left} tokens were not read")
        for part in range(5):
            want[part] += mark[part + 1]
    totals = gen.scheduler.totals()
    have = [*msgspec.structs.astuple(totals)]
    if have != want and not gen.sim.world.mix:
        raise Violation(f"at the end the totals are {have}, in truth {want}")


# ── skips and errors ────────────────────────────────────────────────────────────────────────


def skip(gen: Generation, one: Skip) -> None:
    """What is left out may be, for a reason, and was not given away before."""
    stream = gen.sim.streams[one.lane]
    begin = gen.base.lanes[one.lane]
    if (one.sequence, one.block) < (begin.sequence, begin.block + (begin.token > 0)):
        raise Violation(f"{one} leaves out what was consumed: the cursor is {begin}")
    if stream.at > (one.sequence, one.block):
        raise Violation(f"{one} leaves out what was read: the stream is at {stream.at}")
    if len(gen.scheduler.state.skips) > gen.scheduler.state.plan.max_bad_shards:
        raise Violation(f"{one} is one more than is allowed")
    shard = stream.shard_at(one.sequence)
    if gen.sim.blame[shard] < 3:
        raise Violation(f"{one} has no cause")
    gen.sim.killed_by[shard] = 0


def explained(gen: Generation, error: FinewebError) -> None:
    """The error names something that has happened."""
    if not _has_cause(gen, error):
        raise Violation(f"{type(error).__name__} without a cause: {error.what}")


def _has_cause(gen: Generation, error: FinewebError) -> bool:
    sim, world = gen.sim, gen.sim.world
    match error:
        case BudgetError():
            return _too_small(gen, error.what)
        case BadRecordsError():
            return gen.bad_records > gen.scheduler.state.plan.max_bad_records
        case WorkerCrashError():
            name = error.what.split()[0]
            return gen.row[name] > gen.scheduler.state.plan.max_restarts
        case ShardError() if "no text at all" in error.what:
            stream = sim.streams[int(error.what.split()[1].rstrip(":"))]
            sequence = gen.scheduler.state.lanes[stream.lane].runs[0].sequence
            before, here = stream.mark(sequence - 100, 0), stream.mark(sequence, 0)
            return before is not None and here is not None and before[0] == here[0]
        case SourceError() | ShardError():
            named = re.search(r"shard-(\d+)", error.what)
            full = len(gen.scheduler.state.skips) >= gen.scheduler.state.plan.max_bad_shards
            full |= any(at.token > 0 for at in gen.base.lanes)  # of a block half consumed
            known = "tokenizers" in error.what  # its tokens may be in the ring already
            return named is not None and (full or known) and sim.blame[int(named[1])] >= 3
        case _:
            named = re.search(r"shard-(\d+), block (\d+)", error.what)
            return (
                named is not None
                and (int(named[1]), int(named[2])) in sim.other_tokens
                and (world.epochs == 1)
            )


def _too_small(gen: Generation, what: str) -> bool:
    """The budget cannot hold what the run cannot do without."""
    sim, world = gen.sim, gen.sim.world
    known = world.checkpoints if gen.ready else gen.scheduler.state.checkpoint_bytes or 0
    if world.fixed_bytes + known + world.floor * world.lanes > sim.disk.budget:
        return True
    if "in the cache" in what:  # its readers hold more than was thought that checkpoints leave
        current = [lane.runs[0].shard for lane in gen.scheduler.state.lanes if lane.runs]
        held = sum(max(world.floor, gen.found.get(shard, 0)) for shard in current)
        return gen.known is not None and world.fixed_bytes + known + held > sim.disk.budget
    steps = [
        -(-shard.size // world.step_bytes) * world.step_bytes
        for shard in world.shards
        if not shard.local and shard.listed is None
    ]
    most = max([world.floor, *steps])
    if world.fixed_bytes + known + most * world.lanes <= sim.disk.budget:
        return False
    consumer: Consumer = gen.children[CONSUMER]  # type: ignore[assignment]
    commands = gen.scheduler.state.commands
    unsent = [c.message for c in commands if isinstance(c, Send) and c.worker == CONSUMER]
    return consumer.will_starve(unsent)
