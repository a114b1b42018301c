"""Defects planted in the scheduler, to show that the simulation finds them.

Pure. A mutant replaces one piece of one function's source while it is planted. The second half
are defects that the simulation has found in the real code: planted again, they must be found again.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import mixture, placing
from pipeline.fetching import Fetching
from pipeline.filling import Filling
from pipeline.placing import Placing
from pipeline.scheduler import Scheduler
from pipeline.state import Run
from tests.simulation.shrink import failure
from tests.simulation.simulation import Simulation
from tests.simulation.worlds import SimShard, World, draw, draw_plain


@dataclass(frozen=True)
class Mutant:
    """A defect: in the function `name` of `owner`, `old` becomes `new`."""

    what: str
    owner: Any  # class or module
    name: str
    old: str
    new: str
    first: int = 0  # a rare one is looked for from a seed on that is known to find it
    world: World | None = None  # or in a world that no seed is near

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the defect while the block lasts.

        Raises:
            ValueError: the source has no such piece, or more than one.
        """
        function: Callable[..., Any] = inspect.getattr_static(self.owner, self.name)
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"{self.what}: {source.count(self.old)} times {self.old!r}")
        flags = __future__.annotations.compiler_flag
        code = compile(source.replace(self.old, self.new), f"<{self.what}>", "exec", flags)
        made: dict[str, Any] = {}
        exec(code, function.__globals__, made)
        setattr(self.owner, self.name, made[self.name])
        try:
            yield
        finally:
            setattr(self.owner, self.name, function)

    def found_at(self, seeds: int) -> tuple[int, str] | None:
        """The first of so many seeds whose simulation breaks a promise, and which."""
        with self.planted():
            for seed in range(self.first, self.first + seeds):
                if what := failure(Simulation(self.world or draw(seed))):
                    return seed, what
        return None


_UNWANTED = World(  # a shard ahead whose fetch fails when it has been given up for room
    seed=2150349,
    shards=(SimShard(27, None, False, ()), SimShard(0, 20, False, ())),
    lanes=1,
    epochs=1,
    shuffle=None,
    seq_len=1,
    slot_windows=1,
    ring_slots=2,
    text_slots=1,
    fetchers=2,
    decompressors=1,
    tokenizers=3,
    prefetch=0,
    extra_bytes=26,
    step_bytes=8,
    fixed_bytes=0,
    checkpoint_bytes=0,
    kept=1,
    understated=0,
    max_bad_records=99,
    max_bad_shards=2,
    writer=False,
    update_windows=1,
    checkpoint_every=2,
    stop_after=None,
    slow=(1, 1, 1, 1, 1),
    faults=(),
)
PLANTED = (
    Mutant("a dead tokenizer's blocks are lost", Placing, "died",
           "self.filling.pending.append(block)", "pass"),
    Mutant("a dead tokenizer's blocks count as encoded", Placing, "died",
           "block.worker, block.encoded, block.granted = None, False, block.placed",
           "block.worker, block.granted = None, block.placed"),
    Mutant("a dead decompressor's slot is lost", Filling, "_close",
           "self.state.free_slots.append(run.filling)", "pass"),
    Mutant("a dead worker is not started again", Scheduler, "on_death",
           "state.emit(Spawn(name, worker.role, 0.0 if wanted else delay))", "pass"),
    Mutant("a file is deleted that another lane uses", Fetching, "_detach",
           "if not file.users:", "if True:"),
    Mutant("a shard is done with before its blocks are placed", Placing, "_retire",
           "while lane.runs and lane.runs[0].complete:",
           "while lane.runs and lane.runs[0].all_positioned:"),
    Mutant("a file is deleted under its fetcher", Fetching, "drop",
           "if file.worker is not None:", "if False:"),
    Mutant("an empty block takes a position", Placing, "_position",
           "lane.position += block.count", "lane.position += max(1, block.count)"),
    Mutant("a slot is published without its halo", Placing, "_publish",
           "(lane.published + 1) * C + 1", "(lane.published + 1) * C"),
    Mutant("granted counts as placed", Placing, "_retire",
           "lane.placed = max(lane.placed, block.start + block.placed)",
           "lane.placed = max(lane.placed, block.start + block.granted)"),
    Mutant("one slot too many is granted", Placing, "_grant",
           "limit = (lane.released + ring.slots)", "limit = (lane.released + ring.slots + 1)"),
    Mutant("a position is granted twice", Placing, "_grant",
           "if block.slot is None or not block.encoded or block.granted > block.placed:",
           "if block.slot is None or not block.encoded:"),
    Mutant("a text slot is free when its block is encoded", Placing, "encoded",
           "block.encoded = True",
           "block.encoded = True; self.state.free_slots.append(block.slot)"),
    Mutant("kept text slots are given away", Filling, "assign",
           "if head is not None and len(free) > len(keep - {lane.index}):",
           "if head is not None and free:"),
    Mutant("shards read ahead take kept text slots", Filling, "assign",
           "if run is not head and len(free) > len(keep):", "if run is not head and free:"),
    Mutant("the cursor is one block too far", placing, "_lane_cursor",
           "LaneCursor(record.sequence, record.number,",
           "LaneCursor(record.sequence, record.number + 1,"),
    Mutant("the cursor forgets the token in its block", placing, "_lane_cursor",
           "token = position - record.start", "token = 0"),
    Mutant("a cursor says where another block begins", placing, "_lane_cursor",
           "position, record.place)", "position, lane.begin.place)"),
    Mutant("where the next block begins is forgotten", Filling, "filled",
           "run.place = message.next", "pass"),
    Mutant("a shard's last filtered documents are not counted", Placing, "_position",
           "lane.filtered += run.ended_filtered", "pass"),
    Mutant("tokens before the cursor are placed again", Placing, "_position",
           "block.first = max(0, lane.base - lane.position)", "block.first = 0"),
    Mutant("the cursor forgets what was skipped", Placing, "cursor",
           "skips=tuple(self.state.skips)", "skips=()"),
    Mutant("a failed fetch gives up its reservation, and its bytes stay", Fetching, "_finish",
           "file.state = FileState.ABSENT",
           "file.state, file.reserved_bytes = FileState.ABSENT, 0"),
    Mutant("checkpoints are not charged", Fetching, "charge_bytes",
           "(state.checkpoint_bytes or 0)", "0"),
    Mutant("a grant is given again and again", Fetching, "_grow",
           "file.wants_more = False", "pass"),
    Mutant("a wake-up is lost: work is given out before it is known", Scheduler, "_settle",
           "    self.placing.advance()\n        self.fetching.assign()\n        "
           "self.filling.assign()\n        self.placing.assign()",
           "    self.fetching.assign(); self.filling.assign(); self.placing.assign()\n        "
           "self.placing.advance(); break"),
    Mutant("a data set is read from another's shards", mixture._SideBySide, "turn",
           "first + turn.shard", "turn.shard"),
    Mutant("the reader of a mix is thought to take a window of each lane in turn", Scheduler,
           "_reader_waits", "self.state.plan.groups or", "None or", first=1100),
    Mutant("a hang is never found", Scheduler, "on_time",
           "silent > state.plan.hang_s", "False"),
)  # fmt: skip

FOUND = (
    Mutant("a cached shard beyond its floor is kept before checkpoints are known", Fetching,
           "_fits", "self.state.checkpoint_bytes is None and reserved_bytes > self.floor", "False",
           first=6500),
    Mutant("a shard grows beyond its floor before it is sure what checkpoints need", Fetching,
           "_grow", "if not state.confirmed and want > self.floor:", "if False:", first=6000),
    Mutant("a refused checkpoint is set aside all the same", Fetching, "confirm",
           "self.check_budget(checkpoint_bytes)\n",
           "state.checkpoint_bytes = checkpoint_bytes; self.check_budget(checkpoint_bytes)\n",
           first=7400),
    Mutant("checkpoints that find no room are granted to the end", Fetching, "confirm",
           "state.checkpoint_bytes = known", "pass", world=draw_plain(5058677)),
    Mutant("shards ahead keep what checkpoints turn out to need", Fetching, "confirm",
           "while (charge := self.charge_bytes()) > state.plan.budget_bytes:", "while False:",
           first=1300),
    Mutant("a shard ahead is fetched again while its room is needed", Fetching, "attach",
           "or self._waiting()", "", first=300),
    Mutant("a shard read ahead never makes room", Fetching, "_give_up_ahead",
           'self.kill(run.worker, "the shard that it reads ahead has to make room")', "pass",
           first=300),
    Mutant("a file that two lanes share counts twice", Fetching, "charge_bytes",
           "(current if alone else ahead).append(file.reserved_bytes)",
           "(current if alone else ahead).extend([file.reserved_bytes] * max(1, len(file.users)))"),
    Mutant("a fetch fails, and a file that nobody wants stays", Fetching, "failed",
           "if not file.users:", "if False:", world=_UNWANTED),
    Mutant("starved while the reader has slots to free", Scheduler, "_check_not_stuck",
           "elif self._reader_waits():", "else:"),
    Mutant("the wait for bytes counts as silence", Fetching, "_grow",
           "state.workers[file.worker].heard = state.now", "pass"),
    Mutant("a worker that hangs at its start is never found", Scheduler, "on_time",
           "or not worker.ready", ""),
    Mutant("a shard left out from a block on is not read up to it", Run, "leave_out",
           "if self.next_block >= self.end_block:\n        self.num_blocks = self.next_block",
           "self.num_blocks = self.end_block", first=300),
    Mutant("a block read after its shard was left out is kept", Filling, "filled",
           "if run.ended:", "if False:", first=3001000),
    Mutant("damage found twice is a bad shard", Filling, "unreadable",
           "if file.state is not FileState.CACHED:", "if False:", first=1100),
    Mutant("another stream holds the damaged file open", Filling, "unreadable",
           'self.fetching.kill(other.worker, "its shard is damaged in the cache")', "pass",
           first=200),
    Mutant("a left out block counts its documents", Filling, "_leave_out",
           "block.count, block.digest, block.documents, block.text_bytes = 0, 0, 0, 0",
           "block.count, block.digest = 0, 0"),
    Mutant("the cursor passes bad records at a shard's end", placing, "_lane_cursor",
           "if not run.all_positioned or run.uncounted", "if not run.all_positioned", first=500),
    Mutant("no cursor before the first block", placing, "_lane_cursor",
           "if position == lane.base and not lane.records:", "if False:"),
    Mutant("a block that kills when it is placed is tried for ever", Placing, "died",
           "placing.place_kills += 1", "pass"),
    Mutant("a worker's deaths in a row are forgotten", Scheduler, "on_death",
           "deaths = worker.deaths + (not worker.killed)", "deaths = 1"),
    Mutant("an endless lane without text is read for ever", Placing, "_look_for_tokens",
           "if plan.lanes.endless and", "if False and", first=609),
    Mutant("a block that is half consumed is left out", Fetching, "skip_rest",
           "if consumed or", "if", first=400),
)  # fmt: skip
