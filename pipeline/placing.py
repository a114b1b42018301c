"""Which block is encoded next, and where its tokens go in the ring.

Runs in: supervisor. Pure: the last of the scheduler's three stages.

A block's position is the sum of the counts before it in its lane. It may be written as far as
the ring has room (a block longer than the ring flows through); a slot is published when it and
its halo, the token after it, are placed.
"""

from __future__ import annotations

from pipeline.errors import CursorMismatchError, FinewebError, ShardError
from pipeline.fetching import Fetching
from pipeline.filling import Filling
from pipeline.messages import (
    Counts,
    Cursor,
    Encode,
    Encoded,
    LaneCursor,
    LaneEnded,
    Place,
    Placed,
    SlotPublished,
    SlotReleased,
)
from pipeline.state import Block, Lane, Record, Send, State, Worker

_ENCODES_AHEAD = 2  # blocks that a tokenizer may have to encode: one at work, one next
_MAX_BARREN = 100  # shards without a token in a row, of an endless lane
CONSUMER = "consumer"


class Placing:
    """Blocks, positions and the ring."""

    def __init__(self, state: State, fetching: Fetching, filling: Filling) -> None:
        self.state = state
        self.fetching = fetching
        self.filling = filling
        self._blocks: dict[int, Block] = {}  # handed to a tokenizer and not done
        self.tokens = 0  # encoded in this generation

    # ── encoding ────────────────────────────────────────────────────────────────────────────

    def assign(self) -> None:
        """Hand blocks to tokenizers with room: what the reader needs first goes first."""
        pending = self.filling.pending
        if not pending:
            return
        pending.sort(key=self._urgency)
        while pending:
            idle = self.state.idle("tokenizer", lambda worker: len(worker.queue) < _ENCODES_AHEAD)
            if not idle:
                return
            worker, block = min(idle, key=lambda w: len(w.queue)), pending.pop(0)
            block.worker = worker.name
            self._blocks[block.id] = block
            worker.queue.append(block)
            assert block.slot is not None
            self.state.give(worker, Encode(block.id, block.slot))

    def _urgency(self, block: Block) -> tuple[int, int, int]:
        lane = self.state.lanes[block.run.lane]
        ahead = block.run.sequence - lane.runs[0].sequence
        return ahead, lane.position - lane.released * self.state.plan.ring.slot_tokens, block.number

    def encoded(self, worker: Worker, message: Encoded) -> None:
        state = self.state
        state.answered(worker)
        block = self._blocks[message.block]
        worker.queue.remove(block)
        block.encoded = True
        block.kills = 0
        self.tokens += message.num_tokens
        if block.count is None:
            block.count, block.digest = message.num_tokens, message.digest
        elif (block.count, block.digest) != (message.num_tokens, message.digest):
            state.fail(
                FinewebError(
                    f"{state.name(block.run)}, block {block.number}: encoded again it gave other "
                    f"tokens ({message.num_tokens} instead of {block.count})",
                    "the tokenizer is not deterministic or the memory is faulty: report this",
                )
            )

    # ── positions ───────────────────────────────────────────────────────────────────────────

    def advance(self) -> None:
        """Everything that follows from what is known, lane by lane."""
        for lane in self.state.lanes:
            self._position(lane)
            self._grant(lane)
            self._retire(lane)
            self._publish(lane)

    def _position(self, lane: Lane) -> None:
        """Give positions to the blocks whose predecessors are all counted."""
        for run in lane.runs:
            while (block := run.blocks.get(run.positioned)) is not None and block.count is not None:
                self._record(lane, block)
                block.start = lane.position
                block.first = max(0, lane.base - lane.position)
                if block.first > block.count:
                    self.state.fail(_cursor_beyond(self.state.name(run), block))
                block.granted = block.placed = min(block.first, block.count)
                lane.position += block.count
                lane.flow.append(block)
                run.positioned += 1
                if block.slot is None:  # skipped: there is nothing to place
                    del run.blocks[block.number]
            if not run.all_positioned:
                return
            lane.bad_records += run.ended_bad
            lane.filtered += run.ended_filtered
            run.ended_bad = run.ended_filtered = 0

    def _record(self, lane: Lane, block: Block) -> None:
        assert block.count is not None
        lane.records.append(
            Record(
                start=lane.position,
                end=lane.position + block.count,
                sequence=block.run.sequence,
                number=block.number,
                shards=block.run.sequence - lane.begin.sequence,
                documents=lane.documents,
                text_bytes=lane.text_bytes,
                bad_records=lane.bad_records,
                filtered=lane.filtered,
                place=block.place,
            )
        )
        lane.documents += block.documents
        lane.text_bytes += block.text_bytes
        lane.bad_records += block.num_bad
        lane.filtered += block.filtered

    def _grant(self, lane: Lane) -> None:
        """Let tokenizers write as far as the ring has room."""
        ring = self.state.plan.ring
        limit = (lane.released + ring.slots) * ring.slot_tokens
        for block in lane.flow:
            assert block.start is not None and block.count is not None
            if block.start > limit:
                return
            if block.slot is None or not block.encoded or block.granted > block.placed:
                continue  # done, being encoded again, or a Place is under way
            upto = min(block.count, limit - block.start)
            if upto > block.placed or block.placed == block.count:
                assert block.worker is not None
                block.granted = upto
                self._place(self.state.workers[block.worker], lane, block, upto)

    def _place(self, worker: Worker, lane: Lane, block: Block, upto: int) -> None:
        """Send a Place; one of no tokens tells the tokenizer to forget a block of which none is
        wanted."""
        assert block.start is not None
        if upto == block.placed:
            block.granted = block.placed + 1  # under way, so that it is sent once
        self.state.give(
            worker,
            Place(
                block=block.id,
                lane=lane.index,
                position=block.start + block.placed,
                first=block.placed,
                count=upto - block.placed,
            ),
        )

    def placed(self, worker: Worker, message: Placed) -> None:
        self.state.answered(worker)
        block = self._blocks[message.block]
        assert block.placed == message.first, "a Placed that nobody asked for"
        block.placed = block.granted = message.first + message.count
        block.place_kills = 0
        if block.placed == block.count:
            del self._blocks[block.id]
            self.filling.free(block)
            block.run.blocks.pop(block.number, None)
            block.worker = None

    def _retire(self, lane: Lane) -> None:
        """Move the end of what is placed without a gap, and complete shards."""
        while lane.flow and lane.flow[0].done:
            block = lane.flow.popleft()
            assert block.start is not None and block.count is not None
            lane.placed = max(lane.placed, block.start + block.count)
        if lane.flow:
            block = lane.flow[0]
            assert block.start is not None
            lane.placed = max(lane.placed, block.start + block.placed)
        while lane.runs and lane.runs[0].complete:
            self.fetching.complete(lane)
            self.filling.extend(lane)
            self._look_for_tokens(lane)
        if lane.finished and not lane.runs and lane.end is None:
            lane.end = lane.position
            lane.placed = max(lane.placed, lane.end)

    def _look_for_tokens(self, lane: Lane) -> None:
        """An endless lane without a token in it would be read for ever."""
        lane.barren = 0 if lane.position > lane.fertile else lane.barren + 1
        lane.fertile = lane.position
        plan = self.state.plan
        if plan.lanes.endless and lane.barren >= max(_MAX_BARREN, 2 * len(plan.shards)):
            self.state.fail(
                ShardError(
                    f"lane {lane.index}: {lane.barren} shards in a row have no text at all, and "
                    "the epochs have no end",
                    "check data.stream.shards and data.stream.text_field, or set "
                    "data.stream.epochs",
                )
            )

    def _publish(self, lane: Lane) -> None:
        """Publish slots that are whole, halo included, and the lane's end."""
        C = self.state.plan.ring.slot_tokens
        while True:
            begin, end = lane.published * C, (lane.published + 1) * C + 1
            if lane.end is not None:
                if begin >= lane.end or lane.end <= lane.base:
                    break
                end = min(end, lane.end)
            if lane.placed < end:
                break
            self.state.emit(Send(CONSUMER, SlotPublished(lane.index, lane.published, end)))
            lane.published += 1
        if lane.end is not None and not lane.end_sent:
            lane.end_sent = True
            self.state.emit(Send(CONSUMER, LaneEnded(lane.index, lane.end)))

    def released(self, message: SlotReleased) -> None:
        lane = self.state.lanes[message.lane]
        assert message.slot == lane.released < lane.published, "slots are released in order"
        lane.released += 1

    # ── deaths ──────────────────────────────────────────────────────────────────────────────

    def died(self, worker: Worker) -> None:
        """A tokenizer died: its blocks go to others; the one that it was encoding is a suspect,
        and the one that it was placing."""
        blocks = [block for block in self._blocks.values() if block.worker == worker.name]
        encoding = next(iter(worker.queue), None)
        placing = next((block for block in blocks if block.granted > block.placed), None)
        worker.queue.clear()
        for block in blocks:
            del self._blocks[block.id]
            block.worker, block.encoded, block.granted = None, False, block.placed
            self.filling.pending.append(block)
        if worker.killed:
            return
        if placing is not None:
            placing.place_kills += 1
        if encoding is not None:
            encoding.kills += 1
        for suspect in (encoding, placing):
            if suspect and max(suspect.kills, suspect.place_kills) >= self.state.plan.max_kills:
                name = self.state.name(suspect.run)
                error = ShardError(
                    f"{name}: encoding block {suspect.number} has killed "
                    f"{self.state.plan.max_kills} tokenizers",
                    "see log.txt; --max-bad-shards lets the run go on without this block",
                )
                self.filling.skip_block(suspect, error)
                return

    # ── cursor ──────────────────────────────────────────────────────────────────────────────

    def cursor(self, positions: tuple[int, ...], base: Cursor) -> Cursor:
        """The cursor at these positions, none of which goes back behind an earlier one.

        Raises:
            ValueError: a position was not published, or lies before an earlier cursor's.
        """
        lanes, totals = [], base.counts
        for lane, position in zip(self.state.lanes, positions, strict=True):
            records = lane.records
            while records and records[0].end <= position and len(records) > 1:
                records.popleft()
            at = _lane_cursor(lane, position)
            lanes.append(at[0])
            totals = Counts(*(a + b for a, b in zip(_counts(totals), at[1], strict=True)))
        return Cursor(
            fingerprint=base.fingerprint,
            identity=base.identity,
            lanes=tuple(lanes),
            counts=totals,
            skips=tuple(self.state.skips),
        )

    def totals(self, base: Counts) -> Counts:
        """Totals over everything that has got a position."""
        lanes = self.state.lanes
        return Counts(
            shards=base.shards
            + sum(lane.next_sequence - len(lane.runs) - lane.begin.sequence for lane in lanes),
            documents=base.documents + sum(lane.documents for lane in lanes),
            text_bytes=base.text_bytes + sum(lane.text_bytes for lane in lanes),
            bad_records=base.bad_records + sum(lane.bad_records for lane in lanes),
            filtered=base.filtered + sum(lane.filtered for lane in lanes),
        )


_Counts = tuple[int, int, int, int, int]


def _counts(counts: Counts | Record) -> _Counts:
    return (
        counts.shards, counts.documents, counts.text_bytes, counts.bad_records, counts.filtered
    )  # fmt: skip


def _lane_cursor(lane: Lane, position: int) -> tuple[LaneCursor, _Counts]:
    """One lane's cursor, and its totals before the cursor's block."""
    for record in lane.records:
        if record.start <= position < record.end:
            token = position - record.start
            at = LaneCursor(record.sequence, record.number, token, position, record.place)
            return at, _counts(record)
    if position == lane.base and not lane.records:
        return lane.begin, (0, 0, 0, 0, 0)  # the block that it points into has yet to come again
    if position != lane.position:
        raise ValueError(f"lane {lane.index} was never at position {position}")
    # a shard whose last bad records are not counted yet is not behind the cursor
    run = next((run for run in lane.runs if not run.all_positioned or run.uncounted), None)
    if run is None:
        at = LaneCursor(lane.next_sequence, 0, 0, position)
    else:
        at = LaneCursor(run.sequence, run.positioned, 0, position, run.place_of(run.positioned))
    shards = at.sequence - lane.begin.sequence
    return at, (shards, lane.documents, lane.text_bytes, lane.bad_records, lane.filtered)


def _cursor_beyond(shard: str, block: Block) -> CursorMismatchError:
    return CursorMismatchError(
        f"{shard}: the checkpoint's cursor points behind the end of block {block.number} "
        f"({block.first} of {block.count} tokens)",
        "the shard is not the one that the checkpoint was made with",
    )
