"""What the scheduler knows: files, lanes, shards being read, blocks on their way, workers.

Runs in: supervisor. Pure data; the rules stand in fetching, filling and placing.

    lane    turns of shards, in order ─▶ runs (shards opened) ─▶ blocks ─▶ positions in the ring
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import FinewebError
from pipeline.lanes import Lanes
from pipeline.messages import BlockStart, Cursor, LaneCursor, Message, Remote, RingLayout, Skip
from pipeline.turns import Group


class ShardInfo(NamedTuple):
    """What the scheduler must know of a shard of the catalog."""

    name: str
    url: str
    key: str
    version: str
    size_bytes: int | None
    local_path: str | None  # a shard that is read in place takes no bytes and is never deleted
    sha256: str | None = None  # what its bytes must have
    streamed: bool = False  # --max-disk 0: read in place though it is remote

    @property
    def remote(self) -> Remote | None:
        """What reading it through memory needs, if it is read so."""
        return Remote(self.url, self.size_bytes, self.version) if self.streamed else None

    @property
    def local_sha256(self) -> str | None:
        """What a file of this disk must have: nobody has checked it before."""
        return None if self.local_path is None or self.streamed else self.sha256


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run, fixed while it lasts."""

    shards: tuple[ShardInfo, ...]
    lanes: Lanes
    ring: RingLayout
    seq_len: int  # T: how far the reader goes in one lane before it turns to the next
    text_slots: int
    cache_dir: str
    budget_bytes: int
    fixed_bytes: int  # logs and small files: part of the budget, never given to shards
    workers: dict[str, int]  # role → number of processes
    prefetch: int = 2
    max_bad_records: int = 0
    max_bad_shards: int = 0
    max_kills: int = 3  # deaths that one block or shard may cause
    max_restarts: int = 20  # deaths of one worker without finished work in between
    grant_step_bytes: int = 16 << 20  # growth of a shard of unknown length
    hang_s: float = 180.0  # a worker with work that says nothing for this long is killed
    disk_full_retry_s: float = 5.0
    cursor: Cursor | None = None
    groups: tuple[Group, ...] = ()  # the data sets' lanes, all ranks'; none: there is one
    owned: tuple[int, ...] = ()  # what our lanes are called in groups; none: as here


# ── commands ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Send:
    """Send a message to a worker."""

    worker: str
    message: Message


@dataclass(frozen=True)
class Spawn:
    """Start a worker after delay_s."""

    worker: str
    role: str
    delay_s: float = 0.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL a worker; its death is reported like any other."""

    worker: str
    reason: str


@dataclass(frozen=True)
class Evict:
    """Delete whatever the cache holds of a shard, partial or whole, before the next command."""

    shard: int
    size_bytes: int


@dataclass(frozen=True)
class Note:
    """Something for the log: an event in the past tense and its fields."""

    level: str
    event: str
    fields: dict[str, object]


Command = Send | Spawn | Kill | Evict | Note


# ── files ───────────────────────────────────────────────────────────────────────────────────


class FileState(enum.Enum):
    """Where a shard's file stands."""

    ABSENT = "absent"  # nothing, or a partial file whose bytes stay reserved
    FETCHING = "fetching"
    CACHED = "cached"


@dataclass
class File:
    """The cached copy of one shard: shared by all turns of that shard."""

    shard: int
    state: FileState = FileState.ABSENT
    reserved_bytes: int = 0  # set aside on disk, written or not
    have_bytes: int = 0  # of a partial file, as last reported
    path: str | None = None
    worker: str | None = None  # the fetcher at work
    wants_more: bool = False  # the fetcher waits for a larger grant
    needs_bytes: int = 0  # shards of unknown length: it is known to be longer than this
    users: set[tuple[int, int]] = field(default_factory=set)  # (lane, sequence)
    kills: int = 0  # fetchers that died at it without getting any further
    died_at_bytes: int = 0  # how far it was at the last of these deaths
    damaged: int = 0
    not_before: float = 0.0


# ── runs and blocks ─────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Block:
    """Documents on their way from a text slot to the ring."""

    id: int
    run: Run
    number: int
    slot: int | None
    text_bytes: int
    documents: int
    num_bad: int
    filtered: int = 0
    place: BlockStart | None = None  # where it begins in its shard
    worker: str | None = None  # the tokenizer that encodes it or holds its tokens
    encoded: bool = False  # that tokenizer holds the tokens now
    count: int | None = None  # tokens; known from the first encoding on
    digest: int | None = None
    start: int | None = None  # absolute position of token 0
    first: int = 0  # tokens before this one were consumed before this generation
    granted: int = 0  # tokens up to here may be written
    placed: int = 0  # tokens up to here stand in the ring
    kills: int = 0  # tokenizers that died encoding it
    place_kills: int = 0  # tokenizers that died placing it

    @property
    def done(self) -> bool:
        """All tokens stand in the ring."""
        return self.start is not None and self.slot is None


@dataclass(eq=False)
class Run:
    """One turn of a shard: opened for reading, or about to be."""

    lane: int
    sequence: int
    shard: int
    epoch: int
    next_block: int = 0  # the next block to be filled
    place: BlockStart | None = None  # where that begins
    positioned: int = 0  # the next block to get a position
    end_block: int | None = None  # blocks from this one on are left out
    attached: bool = False  # uses the file: its bytes are set aside for it
    worker: str | None = None  # the decompressor
    stream: int | None = None
    filling: int | None = None  # text slot of the outstanding FillBlock
    num_blocks: int | None = None  # known once the shard has ended
    ended_bad: int = 0  # bad records after the last block
    ended_filtered: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)  # filled and not yet placed
    kills: int = 0

    def leave_out(self, block: int) -> None:
        """Read no block from this one on."""
        self.end_block = block if self.end_block is None else min(block, self.end_block)
        if self.next_block >= self.end_block:
            self.num_blocks = self.next_block

    def place_of(self, number: int) -> BlockStart | None:
        """Where a block begins that has no tokens in the ring yet, or is to be filled next."""
        return self.blocks[number].place if number in self.blocks else self.place

    @property
    def uncounted(self) -> bool:
        """Ended with bad or filtered records that no total has yet."""
        return bool(self.ended_bad or self.ended_filtered)

    @property
    def ended(self) -> bool:
        return self.num_blocks is not None

    @property
    def all_positioned(self) -> bool:
        """Ended, and every block has its position."""
        return self.ended and self.positioned == self.num_blocks

    @property
    def complete(self) -> bool:
        """Ended, and every block stands in the ring."""
        return self.all_positioned and not self.blocks


class Record(NamedTuple):
    """A block that has its position: what a cursor is computed from."""

    start: int
    end: int
    sequence: int
    number: int
    shards: int  # totals of the lane before this block
    documents: int
    text_bytes: int
    bad_records: int
    filtered: int
    place: BlockStart | None  # where the block begins in its shard


@dataclass(eq=False)
class Lane:
    """One ordered token stream."""

    index: int
    begin: LaneCursor  # where this generation began
    next_sequence: int  # the next turn to become a run
    position: int  # where the next block starts
    runs: deque[Run] = field(default_factory=deque)  # the current one first
    finished: bool = False  # no turn is left to become a run
    flow: deque[Block] = field(default_factory=deque)  # blocks with a position, not retired
    placed: int = 0  # every position before this one stands in the ring
    released: int = 0  # slots before this one are free
    published: int = 0  # slots before this one were published
    end: int | None = None  # the stream's length, once known
    barren: int = 0  # shards in a row that gave no token
    fertile: int = 0  # the position before them
    end_sent: bool = False
    records: deque[Record] = field(default_factory=deque)
    documents: int = 0  # totals over blocks with a position, in this generation
    text_bytes: int = 0
    bad_records: int = 0
    filtered: int = 0

    @property
    def base(self) -> int:
        """Absolute position of the first token of this generation."""
        return self.begin.position

    @property
    def head(self) -> Run | None:
        """The first run that still has blocks to come out of its shard."""
        for run in self.runs:
            if run.num_blocks is None:
                return run
        return None


@dataclass(eq=False)
class Worker:
    """One process, as the scheduler sees it."""

    name: str
    role: str
    ready: bool = False
    work: int = 0  # messages handed out that have not been answered
    queue: deque[Block] = field(default_factory=deque)  # tokenizer: blocks to encode
    fills: deque[Run] = field(default_factory=deque)  # decompressor: fills under way
    file: File | None = None  # fetcher
    heard: float = math.inf  # when it last said something, or was given its first work
    busy_since: float | None = None
    busy_s: float = 0.0
    deaths: int = 0  # in a row
    restarts: int = 0  # in all
    killed: bool = False  # by us, so its death says nothing about its work


@dataclass
class State:
    """All of it, shared by the three stages."""

    plan: Plan
    lanes: list[Lane]
    files: list[File]
    workers: dict[str, Worker]
    free_slots: list[int]
    checkpoint_bytes: int | None  # set aside for checkpoints; None: not known yet
    skips: list[Skip]
    confirmed: bool = False  # the consumer itself has said what its checkpoints need
    now: float = 0.0
    disk_full_until: float = 0.0  # until then nothing is fetched
    commands: list[Command] = field(default_factory=list)
    failure: FinewebError | None = None
    bad_shards: int = 0
    evicted_shards: int = 0
    evicted_bytes: int = 0
    fetched_bytes: int = 0
    refetched_bytes: int = 0
    fetched_shards: int = 0

    def emit(self, command: Command) -> None:
        self.commands.append(command)

    def note(self, event: str, level: str = "info", **fields: object) -> None:
        self.commands.append(Note(level, event, fields))

    def files_in_use(self) -> list[File]:
        """Files that a run uses, or that a fetcher is still at work on."""
        shards = {run.shard for lane in self.lanes for run in lane.runs}
        shards |= {worker.file.shard for worker in self.workers.values() if worker.file}
        return [self.files[shard] for shard in sorted(shards)]

    def growing(self) -> list[File]:
        """Files whose fetcher waits for more bytes, and has not been killed."""
        return [
            worker.file
            for worker in self.workers.values()
            if worker.file is not None and worker.file.wants_more and not worker.killed
        ]

    def name(self, run: Run) -> str:
        """How a person knows the run's shard."""
        return self.plan.shards[run.shard].name

    def idle(self, role: str, room: Callable[[Worker], bool]) -> list[Worker]:
        """Workers of a role that are ready and have room, the least loaded first."""
        able = [w for w in self.workers.values() if w.role == role and w.ready and room(w)]
        return sorted(able, key=lambda w: w.work)

    def give(self, worker: Worker, message: Message) -> None:
        """Hand out work that will be answered."""
        if worker.work == 0:
            worker.heard = self.now
            worker.busy_since = self.now
        worker.work += 1
        self.emit(Send(worker.name, message))

    def answered(self, worker: Worker) -> None:
        """One piece of work was answered."""
        worker.work -= 1
        worker.deaths = 0
        if worker.work == 0 and worker.busy_since is not None:
            worker.busy_s += self.now - worker.busy_since
            worker.busy_since = None

    def fail(self, error: FinewebError) -> None:
        """End the run with an error; the first one counts."""
        self.failure = self.failure or error
