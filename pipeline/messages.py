"""The messages between the supervisor and its workers: the whole protocol in one table.

Runs in: every process. Pure.

    supervisor → fetcher        FetcherSetup · Fetch · Grant
    fetcher → supervisor        ReserveMore · FetchProgress · ShardFetched · FetchFailed
    supervisor → decompressor   DecompressorSetup · OpenShard · FillBlock
    decompressor → supervisor   BlockFilled · ShardEnded · ShardUnreadable
    supervisor → tokenizer      TokenizerSetup · Encode · Place
    tokenizer → supervisor      Encoded · Placed
    supervisor → consumer       WriterSetup or TrainerSetup · SlotPublished · LaneEnded
                                · CursorIs · CheckpointGranted · Stop
    consumer → supervisor       ConsumerReady · SlotReleased · CursorWanted · CheckpointWanted
                                · CheckpointFailed · CheckpointWritten · BatchTaken · StepDone
                                · ConsumerDone
    any worker → supervisor     Hello · Working · Log · Failed

The consumer is the trainer or the file writer. A worker never talks to another worker.

One message is one frame: its length in bytes as a little-endian uint32, then msgpack with the
class name as tag. Messages are validated when decoded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.turns import Group


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages: immutable, tagged by class name."""


# ── parts of messages ───────────────────────────────────────────────────────────────────────


class BadRecord(msgspec.Struct, frozen=True, array_like=True):
    """A record that was skipped: where it stands, and why.

    place names the record inside the shard as a person would look for it: 'line 17',
    'member 000012.json', 'row 5 of row group 2'.
    """

    place: str
    reason: str


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A point of a shard at which its reading can begin.

    at: a byte of the decompressed stream, a row group (parquet) or a record batch (arrow).
    records, lines: how many come before it, for messages. bz2: see pipeline/bz2_entry.py.
    """

    at: int = 0
    records: int = 0
    lines: int = 0
    bz2: tuple[int, int, int] | None = None


class BlockStart(msgspec.Struct, frozen=True, array_like=True):
    """Where a block begins: behind so many records after the entry, and so many pieces of the
    next document, which is cut."""

    entry: Entry
    records: int
    pieces: int = 0


class RingLayout(msgspec.Struct, frozen=True, array_like=True):
    """The ring's shape; offsets are computed in shm/layout.py."""

    lanes: int
    slots: int  # per lane
    slot_tokens: int  # C, a multiple of seq_len
    token_bytes: int  # 2 (uint16) or 4 (uint32)


class TextLayout(msgspec.Struct, frozen=True, array_like=True):
    """The text segment's shape; offsets are computed in shm/layout.py."""

    slots: int
    text_bytes: int  # UTF-8 bytes that one slot holds
    documents: int  # document offsets that one slot holds


class LaneCursor(msgspec.Struct, frozen=True):
    """Where one lane stands: the first token that has not been consumed."""

    sequence: int  # the lane's n-th shard
    block: int  # block of that shard
    token: int  # token of that block
    position: int  # the same token's absolute position in the lane
    place: BlockStart | None = None  # where the block begins; None: counted from the shard's start


class Counts(msgspec.Struct, frozen=True):
    """Totals over the blocks before the cursor's blocks, all lanes together."""

    shards: int = 0
    documents: int = 0
    text_bytes: int = 0
    bad_records: int = 0
    filtered: int = 0  # documents that data.filter leaves out


class Skip(msgspec.Struct, frozen=True):
    """A block (or, with rest, that block and all later ones of its shard) that is left out."""

    lane: int
    sequence: int
    block: int
    rest: bool
    reason: str


class Cursor(msgspec.Struct, frozen=True):
    """Where the data stands: part of every checkpoint.

    fingerprint is the hash of identity, which says in words what the stream depends on; a
    cursor of another fingerprint is refused and the differing entries of identity are named.
    """

    fingerprint: str
    identity: dict[str, str]
    lanes: tuple[LaneCursor, ...]
    counts: Counts = Counts()
    skips: tuple[Skip, ...] = ()


# ── fetcher ─────────────────────────────────────────────────────────────────────────────────


class FetcherSetup(Message):
    """First message to a fetcher."""

    cache_dir: str
    source_options: dict[str, Any]


class Fetch(Message):
    """Bring one shard into the cache, resuming its partial file where there is one.

    The partial file may grow to limit_bytes; beyond it the fetcher asks with ReserveMore. url
    may carry secrets and is never logged; name is the same without them.
    """

    shard: int
    url: str
    name: str
    key: str  # names the file in the cache: pipeline/cache.py
    size_bytes: int | None
    version: str
    limit_bytes: int
    sha256: str | None = None  # what the bytes must have


class Grant(Message):
    """The partial file of this shard may grow to limit_bytes (absolute)."""

    shard: int
    limit_bytes: int


class ReserveMore(Message):
    """A shard of unknown length has filled its reservation; the fetcher waits for Grant."""

    shard: int
    have_bytes: int


class FetchProgress(Message):
    """Bytes of the partial file so far; about four times a second."""

    shard: int
    have_bytes: int


class ShardFetched(Message):
    """The shard lies whole in the cache under file_name, fsynced and renamed.

    refetched_bytes counts bytes that were thrown away and fetched again.
    """

    shard: int
    file_name: str
    size_bytes: int
    refetched_bytes: int = 0


class FetchFailed(Message):
    """The shard cannot be fetched, after the fetcher's own bounded retries.

    disk_full: the failure was ENOSPC; the partial file stays and the fetch is tried again later.
    """

    shard: int
    what: str
    remedy: str
    disk_full: bool = False


# ── decompressor ────────────────────────────────────────────────────────────────────────────


class DecompressorSetup(Message):
    """First message to a decompressor."""

    text: TextLayout
    encoding: str  # decides where a document larger than a text slot may be cut
    text_field: str
    share: float = 0.0  # of the documents is held out; see pipeline/holdout.py
    held_out: bool = False  # hand over those instead of the others
    where: str = ""  # only documents for which this holds; see pipeline/filters.py
    min_chars: int | None = None
    max_chars: int | None = None
    source_options: dict[str, Any] = {}


class Remote(msgspec.Struct, frozen=True, array_like=True):
    """A shard that is read where it lies, with --max-disk 0; url may carry secrets."""

    url: str
    size_bytes: int | None
    version: str


class OpenShard(Message):
    """Make a shard readable as stream; its first skip_blocks blocks are passed over, and it
    ends before end_block.

    place: where block skip_blocks begins, if it is known: then nothing before is read. remote:
    where it lies, instead of path. sha256: what the user's own file must have.
    """

    stream: int
    path: str
    name: str
    skip_blocks: int
    end_block: int | None
    place: BlockStart | None = None
    remote: Remote | None = None
    sha256: str | None = None


class FillBlock(Message):
    """Write the next block of the stream into a text slot."""

    stream: int
    slot: int


class BlockFilled(Message):
    """A block stands in the slot: documents and UTF-8 bytes counted, bad records named.

    continues: the first piece goes on with the document that the previous block cut.
    documents counts the documents that begin in this block. filtered counts those that were left
    out while it was gathered; next is where the block behind it begins.
    """

    stream: int
    block: int
    slot: int
    documents: int
    text_bytes: int
    num_bad: int
    bad: tuple[BadRecord, ...]  # the first hundred of num_bad
    filtered: int = 0
    next: BlockStart | None = None


class ShardEnded(Message):
    """No block is left: the slot of the last FillBlock is unused. Bad records and filtered
    documents at the very end."""

    stream: int
    slot: int
    num_blocks: int
    num_bad: int
    bad: tuple[BadRecord, ...]
    filtered: int = 0


class ShardUnreadable(Message):
    """The shard cannot be read on from block on; the slot of the last FillBlock is unused.

    cache_damaged: the file differs from what was fetched, so fetching it again helps. of_source:
    it was read through memory, and cannot be had any more.
    """

    stream: int
    slot: int
    block: int
    what: str
    remedy: str
    cache_damaged: bool
    of_source: bool = False


# ── tokenizer ───────────────────────────────────────────────────────────────────────────────


class TokenizerSetup(Message):
    """First message to a tokenizer."""

    text: TextLayout
    ring: RingLayout
    encoding: str
    vocab_size: int | None


class Encode(Message):
    """Encode the block in the slot into the tokenizer's own memory."""

    block: int  # number of the block in this generation, unique over lanes
    slot: int


class Encoded(Message):
    """The block's tokens are ready: their count and the xxh3_64 of their bytes."""

    block: int
    num_tokens: int
    digest: int
    seconds: float


class Place(Message):
    """Copy tokens [first, first + count) of the block to positions from position on.

    The tokens are forgotten once the block's last token has been placed.
    """

    block: int
    lane: int
    position: int
    first: int
    count: int


class Placed(Message):
    """The tokens of the Place with the same first and count stand in the ring."""

    block: int
    first: int
    count: int


# ── consumer: trainer or writer ─────────────────────────────────────────────────────────────


class WriterSetup(Message):
    """First message to the file writer of `tokenize`.

    lanes tells where each lane stands: the tokens before lanes[i].position are in files already.
    """

    ring: RingLayout
    positions: tuple[int, ...]
    seq_len: int
    out_dir: str
    eot: int  # the end-of-text token: counting it counts documents
    file_tokens: int
    limit_tokens: int | None
    checkpoint_s: float


class TrainerSetup(Message):
    """First message to the trainer.

    config is the resolved configuration as plain data (pipeline/config.py reads it back).
    positions: where each lane stands, a multiple of seq_len each. checkpoint: folder to restore
    from, or None for a fresh start, or where another rank has it.
    """

    ring: RingLayout
    positions: tuple[int, ...]
    config: dict[str, Any]
    run_dir: str
    checkpoint: str | None
    validation: str | None = None  # token file; None: no validation
    groups: tuple[Group, ...] = ()  # the data sets' lanes
    rank: int = 0  # positions and groups are of all lanes, the ring holds this rank's
    size: int = 1


class ConsumerReady(Message):
    """The consumer is set up.

    checkpoint_bytes is the largest size that one checkpoint can take on disk; facts are shown
    to the user (device, parameters, BLAS …).
    """

    checkpoint_bytes: int
    facts: dict[str, Any]


class SlotPublished(Message):
    """Slot number slot of the lane (absolute: it begins at position slot × C) can be read.

    Tokens up to end are valid; end is (slot + 1) × C + 1 (the halo), or the lane's end.
    """

    lane: int
    slot: int
    end: int


class LaneEnded(Message):
    """The lane has no token at end or later. Comes after its last SlotPublished."""

    lane: int
    end: int


class SlotReleased(Message):
    """The consumer needs nothing of this slot any more."""

    lane: int
    slot: int


class CursorWanted(Message):
    """Ask for the cursor at these lane positions (all tokens before them are consumed)."""

    request: int
    positions: tuple[int, ...]


class CursorIs(Message):
    """Answer to CursorWanted; shards names the one that each lane stands in ('' at the end)."""

    request: int
    cursor: Cursor
    shards: tuple[str, ...] = ()


class CheckpointWanted(Message):
    """Ask for bytes on disk before a checkpoint is written."""

    request: int
    size_bytes: int


class CheckpointGranted(Message):
    """The bytes are set aside: write."""

    request: int


class CheckpointFailed(Message):
    """The disk is full: what was written of the checkpoint is deleted, the earlier ones stay.

    The consumer asks again with CheckpointWanted, and the grant comes when it is worth trying.
    """

    what: str


class CheckpointWritten(Message):
    """A checkpoint is durable (fsync, rename, folder fsync) and older ones beyond the retention
    are deleted. size_bytes: all checkpoint files on disk now."""

    step: int
    path: str
    size_bytes: int
    cursor: Cursor


class BatchTaken(Message):
    """The trainer has its first batch: the start is over."""


class StepDone(Message):
    """Metrics of one optimizer update (trainer) or of the last stretch (writer)."""

    metrics: dict[str, Any]


class Stop(Message):
    """Write a checkpoint and end with ConsumerDone."""

    reason: str


class ConsumerDone(Message):
    """The consumer has finished: because the work is complete, or because of Stop."""

    complete: bool
    summary: dict[str, Any]


# ── any worker ──────────────────────────────────────────────────────────────────────────────


class Hello(Message):
    """First message of every worker."""

    role: str
    pid: int


class Working(Message):
    """Still at work on something that takes long and is not told otherwise.

    Sent from the place where the work makes progress, never by a timer: silence is what a
    process that hangs is found by.
    """


class Log(Message):
    """A log line; the supervisor is the only process that writes log files."""

    level: str
    event: str
    fields: dict[str, Any]


class Failed(Message):
    """The worker ends because of an error that trying again does not cure (a user's error has
    its exit code; a bug has code 1 and a traceback)."""

    what: str
    remedy: str
    exit_code: int
    traceback: str = ""


ALL: tuple[type[Message], ...] = tuple(Message.__subclasses__())
