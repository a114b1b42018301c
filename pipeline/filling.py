"""Which shard is read next, into which text slot.

Runs in: supervisor. Pure: the second of the scheduler's three stages.

A text slot is held from the FillBlock on until the block's last token stands in the ring. Each
lane whose head (the shard that its next blocks come from) holds none keeps one slot free for
itself, so no lane can take what another needs to go on; shards read ahead use what is left.
"""

from __future__ import annotations

import itertools

from pipeline.errors import BadRecordsError, ShardError, SourceError
from pipeline.fetching import Fetching
from pipeline.messages import (
    BadRecord,
    BlockFilled,
    FillBlock,
    OpenShard,
    ShardEnded,
    ShardUnreadable,
    Skip,
)
from pipeline.state import Block, FileState, Lane, Run, Send, State, Worker

_FILLS_AHEAD = 2  # FillBlocks that a decompressor may have: one at work, one next


class Filling:
    """Streams and text slots: opens shards, hands out FillBlocks, makes blocks."""

    def __init__(self, state: State, fetching: Fetching) -> None:
        self.state = state
        self.fetching = fetching
        self.pending: list[Block] = []  # filled and with no tokenizer
        self._streams: dict[int, Run] = {}
        self._next_stream = 0
        self._next_block = 0
        self.bad_records = state.plan.cursor.counts.bad_records if state.plan.cursor else 0
        decompressors = state.plan.workers["decompressor"]
        # with few lanes, several shards of one lane are read at once
        self._open_ahead = 1 + -(-decompressors // len(state.lanes))

    # ── lanes and their runs ────────────────────────────────────────────────────────────────

    def extend(self, lane: Lane) -> None:
        """Turn the lane's next shards into runs: the current one and those to be fetched ahead."""
        plan = self.state.plan
        while not lane.finished and len(lane.runs) < 1 + max(plan.prefetch, self._open_ahead - 1):
            turn = plan.lanes.turn(lane.index, lane.next_sequence)
            if turn is None:
                lane.finished = True
                return
            run = Run(lane.index, lane.next_sequence, turn.shard, turn.epoch)
            for skip in self.state.skips:
                if (skip.lane, skip.sequence, skip.rest) == (lane.index, run.sequence, True):
                    run.leave_out(skip.block)  # an earlier generation has decided so
            lane.runs.append(run)
            lane.next_sequence += 1

    def _ahead(self, lane: Lane) -> int:
        """How far the lane is ahead of its reader, in tokens, as far as it is known."""
        waiting = sum(
            block.text_bytes
            for run in lane.runs
            for block in run.blocks.values()
            if block.start is None
        )
        ring_start = max(lane.base, lane.released * self.state.plan.ring.slot_tokens)
        return lane.position - ring_start + waiting // 4

    # ── handing out ─────────────────────────────────────────────────────────────────────────

    def assign(self) -> None:
        """Open fetched shards and hand out FillBlocks, the lane that is least ahead first."""
        free = self.state.free_slots
        lanes = [(lane, lane.head) for lane in sorted(self.state.lanes, key=self._ahead)]
        depth = self._open_ahead if self.state.confirmed else 1  # see Fetching.attach
        for lane, _ in lanes:
            for run in itertools.islice(lane.runs, depth):
                if run.worker is None and not run.ended:
                    self._open(run)
        if not free:
            return
        keep = {lane.index for lane, head in lanes if head and not self._holds(lane, head)}
        for lane, head in lanes:
            if head is not None and len(free) > len(keep - {lane.index}):
                self._fill(head, _FILLS_AHEAD)
                if head.filling is not None:
                    keep.discard(lane.index)
        for lane, head in lanes:
            for run in itertools.islice(lane.runs, depth):
                if run is not head and len(free) > len(keep):
                    self._fill(run, 1)

    @staticmethod
    def _holds(lane: Lane, head: Run) -> bool:
        """Whether the lane holds a slot for a block that does not come after its head."""
        for run in lane.runs:
            if run.filling is not None or run.blocks:
                return True
            if run is head:
                return False
        return False

    def _open(self, run: Run) -> None:
        state, file = self.state, self.state.files[run.shard]
        if not run.attached or file.state is not FileState.CACHED:
            return
        idle = state.idle("decompressor", lambda worker: True)
        if not idle:
            return
        load = {worker.name: 0 for worker in idle}
        for open_run in self._streams.values():
            if open_run.worker in load:
                load[open_run.worker] += 1
        worker = min(idle, key=lambda worker: (load[worker.name], worker.work))
        run.worker, run.stream = worker.name, self._next_stream
        self._streams[self._next_stream] = run
        self._next_stream += 1
        assert file.path is not None
        state.emit(
            Send(
                worker.name,
                OpenShard(
                    run.stream,
                    file.path,
                    state.name(run),
                    run.next_block,
                    run.end_block,
                    run.place,
                    state.plan.shards[run.shard].remote,
                    state.plan.shards[run.shard].local_sha256,
                ),
            )
        )

    def _fill(self, run: Run, most: int) -> None:
        """Hand out the next FillBlock of a run, if it is open and its decompressor has room."""
        state = self.state
        if run.stream is None or run.filling is not None or run.ended or run.worker is None:
            return
        worker = state.workers[run.worker]
        if not worker.ready or len(worker.fills) >= most:
            return
        run.filling = state.free_slots.pop()
        worker.fills.append(run)
        state.give(worker, FillBlock(run.stream, run.filling))

    # ── what decompressors say ──────────────────────────────────────────────────────────────

    def _answer(self, worker: Worker, stream: int) -> Run:
        run = self._streams[stream]
        worker.fills.remove(run)
        self.state.answered(worker)
        return run

    def filled(self, worker: Worker, message: BlockFilled) -> None:
        run = self._answer(worker, message.stream)
        run.filling = None
        run.kills = 0
        if run.ended:  # left out while its decompressor was being killed
            self.state.free_slots.append(message.slot)
            return
        block = Block(
            id=self._next_block,
            run=run,
            number=message.block,
            slot=message.slot,
            text_bytes=message.text_bytes,
            documents=message.documents,
            num_bad=message.num_bad,
            filtered=message.filtered,
            place=run.place,
        )
        self._next_block += 1
        assert message.block == run.next_block, "a decompressor skipped or repeated a block"
        run.next_block += 1
        run.place = message.next
        run.blocks[block.number] = block
        self._report_bad(run, message.num_bad, message.bad)
        place = (run.lane, run.sequence, block.number, False)
        if any((s.lane, s.sequence, s.block, s.rest) == place for s in self.state.skips):
            self._leave_out(block)
        else:
            self.pending.append(block)

    def ended(self, worker: Worker, message: ShardEnded) -> None:
        run = self._answer(worker, message.stream)
        self._close(run)
        if run.ended:  # left out while its decompressor was being killed
            return
        run.num_blocks = message.num_blocks
        run.ended_bad, run.ended_filtered = message.num_bad, message.filtered
        if message.num_blocks < run.next_block:
            what = f"{self.state.name(run)} has {message.num_blocks} blocks, and had more before"
            self.state.fail(ShardError(what, "the shard was changed while it was being read"))
        self._report_bad(run, message.num_bad, message.bad)

    def unreadable(self, worker: Worker, message: ShardUnreadable) -> None:
        run = self._answer(worker, message.stream)
        self._close(run)
        kind = SourceError if message.of_source else ShardError
        error = kind(message.what, message.remedy)
        file = self.state.files[run.shard]
        if run.ended:
            return
        if message.cache_damaged:
            if file.state is not FileState.CACHED:
                return  # another stream has found it out before: it is being fetched again
            for other in self._streams.values():
                if other.shard == run.shard and other.worker is not None:
                    self.fetching.kill(other.worker, "its shard is damaged in the cache")
            if self.fetching.damaged(file, error):
                return
        self.fetching.skip_rest(run, error)

    def _close(self, run: Run) -> None:
        """The stream is no more; the slot of its last FillBlock is free."""
        if run.stream is not None:
            del self._streams[run.stream]
        if run.filling is not None:
            self.state.free_slots.append(run.filling)
        run.stream = run.worker = run.filling = None

    def _report_bad(self, run: Run, num_bad: int, bad: tuple[BadRecord, ...]) -> None:
        state = self.state
        self.bad_records += num_bad
        for record in bad:
            state.note(
                "bad_record",
                level="warning",
                shard=state.name(run),
                place=record.place,
                reason=record.reason,
            )
        if self.bad_records > state.plan.max_bad_records:
            last = bad[-1] if bad else BadRecord("", "")
            state.fail(
                BadRecordsError(
                    f"{self.bad_records} bad records, the last in {state.name(run)}, "
                    f"{last.place}: {last.reason}",
                    f"bad_records.jsonl names them; --max-bad-records allows more than "
                    f"{state.plan.max_bad_records}",
                )
            )

    # ── deaths ──────────────────────────────────────────────────────────────────────────────

    def died(self, worker: Worker) -> None:
        """A decompressor died: its shards are opened again elsewhere, behind the blocks handed
        over; the block that it was filling is the suspect."""
        suspect = worker.fills[0] if worker.fills and not worker.killed else None
        worker.fills.clear()
        for run in [run for run in self._streams.values() if run.worker == worker.name]:
            self._close(run)
        if suspect is not None:
            suspect.kills += 1
            if suspect.kills >= self.state.plan.max_kills:
                self.fetching.skip_rest(
                    suspect,
                    ShardError(
                        f"{self.state.name(suspect)}: reading block {suspect.next_block} has "
                        f"killed {suspect.kills} decompressors",
                        "see log.txt; --max-bad-shards lets the run go on without the rest of it",
                    ),
                )

    def skip_block(self, block: Block, error: ShardError) -> None:
        """Leave out one block if the run allows it and nobody knows its tokens yet, or end."""
        state = self.state
        begin, place = state.lanes[block.run.lane].begin, (block.run.sequence, block.number)
        consumed = begin.token and (begin.sequence, begin.block) == place
        if block.count is not None or consumed or state.bad_shards >= state.plan.max_bad_shards:
            state.fail(error)
            return
        state.bad_shards += 1
        run = block.run
        state.skips.append(Skip(run.lane, run.sequence, block.number, False, error.what))
        state.note("block_skipped", level="warning", what=error.what)
        self.pending.remove(block)
        self._leave_out(block)

    def _leave_out(self, block: Block) -> None:
        """The block has no tokens and counts for nothing, and its slot is free."""
        block.count, block.digest, block.documents, block.text_bytes = 0, 0, 0, 0
        self.free(block)

    def free(self, block: Block) -> None:
        """Give back the block's text slot."""
        assert block.slot is not None
        self.state.free_slots.append(block.slot)
        block.slot = None
