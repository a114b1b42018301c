"""Process: decompressor. Shard files in, text slots out, several shards at once.

Each open shard is a stream that advances one block per FillBlock, so that a lane which has to
wait holds up no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from pipeline import cache, encoding, filters, holdout
from pipeline.blocks import BlockData, Documents, Filtered, blocks
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.codecs import open_documents
from pipeline.errors import ShardError, SourceError
from pipeline.faults import faultpoint
from pipeline.messages import (
    BlockFilled,
    DecompressorSetup,
    Entry,
    FillBlock,
    OpenShard,
    ShardEnded,
    ShardUnreadable,
)
from pipeline.remote_file import open_remote
from shm import segment, text


class _Stream:
    """One open shard: its blocks from the first that is wanted.

    A file of the cache is read once more first, to see that it is what was fetched: not every
    format has checksums, and it may have been lying there since an earlier run.
    """

    def __init__(
        self, message: OpenShard, setup: DecompressorSetup, working: Callable[[], None]
    ) -> None:
        self.path, self.name = message.path, message.name
        self._sha256 = message.sha256
        self.next_block = 0 if message.place is None else message.skip_blocks
        self._verified = False
        self._skip, self._end = message.skip_blocks, message.end_block
        self._blocks: Generator[BlockData, None, None] = _blocks(message, setup, working)

    def advance(self, working: Callable[[], None]) -> BlockData | None:
        """The next block, passing over those that were handed over before if nobody knows where
        it begins.

        Args:
            working: Called now and then: what is passed over takes long.

        Raises:
            ShardError: the file is damaged.
            SourceError: it is read where it lies, and cannot be had.
        """
        if not self._verified and self._sha256 is not None:
            found = _digest(Path(self.path), hashlib.sha256(), working)
            if found != self._sha256:
                raise ShardError(
                    f"{self.name} has the SHA-256 {found}, and should have {self._sha256}",
                    "the shard or its manifest is wrong: make one of them again",
                )
        if not self._verified and _differs_from_fetched(Path(self.path), working):
            raise ShardError(f"{self.name}: its file in the cache is not what was fetched")
        self._verified = True
        while self.next_block < self._skip:
            if next(self._blocks, None) is None:
                return None
            self.next_block += 1
            working()
        if self.next_block == self._end:
            return None
        return next(self._blocks, None)

    def close(self) -> None:
        """Close the file now: one that is deleted while it is open keeps its bytes."""
        self._blocks.close()


def _blocks(
    message: OpenShard, setup: DecompressorSetup, working: Callable[[], None]
) -> Generator[BlockData, None, None]:
    place = message.place
    source: str | BinaryIO = message.path
    if message.remote is not None:
        source = open_remote(message.remote, message.name, setup.source_options, working)
    documents = open_documents(
        source,
        message.name,
        setup.text_field,
        where=filters.Where(setup.where) if setup.where else None,
        begin=place.entry if place is not None else None,
    )
    chosen = _told(documents, working)
    if setup.min_chars is not None or setup.max_chars is not None:
        chosen = filters.by_length(chosen, setup.min_chars, setup.max_chars)
    if setup.share > 0:
        chosen = holdout.select(chosen, setup.share, held_out=setup.held_out)
    try:
        yield from blocks(
            chosen,
            block_bytes=setup.text.text_bytes,
            max_documents=setup.text.documents,
            cut=encoding.safe_cut(setup.encoding),
            begin=place,
        )
    finally:
        documents.close()  # type: ignore[attr-defined]


def _told(documents: Documents, working: Callable[[], None]) -> Documents:
    """The documents; where few are wanted, a block of them takes long."""
    for document in documents:
        if isinstance(document, Entry | Filtered):
            working()
        yield document


class Decompressor:
    """Serves OpenShard and FillBlock in the order in which they come.

    Args:
        channel: To the supervisor.
        setup: First message.
        descriptors: Of the text segment.
    """

    def __init__(
        self, channel: Channel, setup: DecompressorSetup, descriptors: Descriptors
    ) -> None:
        self._channel, self._setup = channel, setup
        memory = segment.attach(descriptors.text, text.size_bytes(setup.text), writable=True)
        self._slots = text.TextSlots(memory, setup.text)
        self._streams: dict[int, _Stream] = {}

    def run(self) -> None:
        """Serve until the supervisor hangs up."""
        while True:
            message = self._channel.receive()
            match message:
                case OpenShard():
                    stream = _Stream(message, self._setup, self._channel.working)
                    self._streams[message.stream] = stream
                case FillBlock():
                    self._fill(message)
                case _:
                    raise TypeError(f"the decompressor got {message!r}")

    def _fill(self, message: FillBlock) -> None:
        stream = self._streams[message.stream]
        try:
            block = stream.advance(self._channel.working)
        except (ShardError, SourceError) as error:
            self._streams.pop(message.stream).close()
            self._channel.send(
                ShardUnreadable(
                    stream=message.stream,
                    slot=message.slot,
                    block=stream.next_block,
                    what=error.what,
                    remedy=error.remedy,
                    cache_damaged=_differs_from_fetched(Path(stream.path), self._channel.working),
                    of_source=isinstance(error, SourceError),
                )
            )
            return
        if block is None or not block.lengths:
            self._streams.pop(message.stream).close()
            left = block or BlockData()
            self._channel.send(
                ShardEnded(
                    stream=message.stream,
                    slot=message.slot,
                    num_blocks=stream.next_block,
                    num_bad=left.num_bad,
                    bad=tuple(left.bad),
                    filtered=left.filtered,
                )
            )
            return
        faultpoint("decompressor:mid_block")
        text_bytes = self._slots.write(
            message.slot, block.pieces, block.lengths, continues=block.continues
        )
        self._channel.send(
            BlockFilled(
                stream=message.stream,
                block=stream.next_block,
                slot=message.slot,
                documents=block.begins,
                text_bytes=text_bytes,
                num_bad=block.num_bad,
                bad=tuple(block.bad),
                filtered=block.filtered,
                next=block.next,
            )
        )
        stream.next_block += 1


def _differs_from_fetched(path: Path, working: Callable[[], None]) -> bool:
    """Whether a file of the cache is not what was fetched, or not there; a user's own file never
    is."""
    entry = cache.parse(path.name)
    if entry is None or entry.digest is None:
        return False
    try:
        return _digest(path, xxhash.xxh3_64(), working) != entry.digest
    except FileNotFoundError:
        return True


def _digest(path: Path, digest: Any, working: Callable[[], None]) -> str:
    """What a hash says of a file, in hexadecimal."""
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
            working()
    said: str = digest.hexdigest()
    return said


def main(channel: Channel, descriptors: Descriptors) -> None:
    """Run one decompressor."""
    setup = channel.receive()
    assert isinstance(setup, DecompressorSetup)
    Decompressor(channel, setup, descriptors).run()
