"""Documents into blocks: the unit that is handed to a tokenizer, and tried again.

Runs in: decompressors. Pure: a block depends on the shard's content and the configuration alone.

Whole documents are gathered until the next would not fit. A document larger than a block is cut
where the tokenizer's own pattern always cuts, and its pieces are blocks of their own. Documents
come one by one, or many in one buffer: then none of them becomes a Python object of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.messages import BadRecord

_NAMED_BAD = 100  # bad records that a block names; the rest is only counted


class Texts(NamedTuple):
    """Consecutive documents in one buffer.

    text: UTF-8 bytes, shape (n_bytes,), uint8. offsets: shape (n_documents + 1,), int64; document
    i is text[offsets[i]:offsets[i + 1]].
    """

    text: np.ndarray
    offsets: np.ndarray

    def one_by_one(self) -> Iterator[bytes]:
        """Each document as bytes of its own."""
        raw = memoryview(self.text)
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield bytes(raw[start:end])


Documents = Iterator[bytes | Texts | BadRecord]


@dataclass
class BlockData:
    """Documents of one block, and the bad records met while they were gathered.

    pieces: buffers that hold the documents' bytes one after the other; lengths: of every document
    (of its part, where one is cut). continues: the first goes on with the document that the
    previous block cut. begins: documents that begin in this block.
    """

    pieces: list[bytes | np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    continues: bool = False
    begins: int = 0
    num_bad: int = 0
    bad: list[BadRecord] = field(default_factory=list)

    def add(self, piece: bytes | np.ndarray, lengths: list[int]) -> None:
        """Take documents that begin here."""
        self.pieces.append(piece)
        self.lengths += lengths
        self.begins += len(lengths)

    def skip(self, record: BadRecord) -> None:
        """Count a bad record, and name it while there are few."""
        self.num_bad += 1
        if len(self.bad) < _NAMED_BAD:
            self.bad.append(record)


def blocks(
    documents: Iterable[bytes | Texts | BadRecord],
    *,
    block_bytes: int,
    max_documents: int,
    cut: Callable[[bytes, int], int],
) -> Iterator[BlockData]:
    """Gather documents into blocks.

    Args:
        documents: UTF-8 texts; a BadRecord is carried with the block that is being gathered.
        block_bytes: Text that a block holds at most.
        max_documents: Documents that a block holds at most.
        cut: (text, limit) → the last safe cut ≤ limit, or 0; see encoding.safe_cut.

    Yields:
        Blocks with at least one document each; a last one without any only if bad records are
        left to report.

    Raises:
        ShardError: what documents has raised. The block that was being gathered is lost with the
            rest of the shard: it would be another one if the shard healed, and a resume could not
            make the same choice.
    """
    gathering = _Gathering(block_bytes, max_documents, cut)
    for document in documents:
        match document:
            case bytes():
                yield from gathering.add(document)
            case Texts():
                yield from gathering.add_all(document)
            case BadRecord():
                gathering.skip(document)
    if gathering.block.lengths or gathering.block.num_bad:
        yield gathering.block


class _Gathering:
    """The block that is being filled, and the rule that says when it is full."""

    def __init__(
        self, block_bytes: int, max_documents: int, cut: Callable[[bytes, int], int]
    ) -> None:
        self._block_bytes, self._max_documents, self._cut = block_bytes, max_documents, cut
        self.block, self._size = BlockData(), 0
        self._records = 0  # met so far, bad ones included

    def skip(self, record: BadRecord) -> None:
        """A record that has no text."""
        self._records += 1
        self.block.skip(record)

    def _start_over(self) -> BlockData:
        full, self.block, self._size = self.block, BlockData(), 0
        return full

    def add(self, document: bytes) -> Iterator[BlockData]:
        """One document; yields the blocks that it completes."""
        size, block = len(document), self.block
        self._records += 1
        if block.lengths and (
            self._size + size > self._block_bytes or len(block.lengths) == self._max_documents
        ):
            yield self._start_over()
        if size <= self._block_bytes:
            self.block.add(document, [size])
            self._size += size
            return
        pieces = _pieces(document, self._block_bytes, self._cut)
        if pieces is None:
            reason = (
                f"its {size} bytes are more than data.stream.block_bytes ({self._block_bytes}) and "
                "have no place where they may be cut"
            )
            self.block.skip(BadRecord(f"record {self._records}", reason))
            return
        for number, piece in enumerate(pieces):
            block = self._start_over()
            block.pieces, block.lengths = [piece], [len(piece)]
            block.continues, block.begins = number > 0, int(number == 0)
            yield block

    def add_all(self, texts: Texts) -> Iterator[BlockData]:
        """Many documents, by the same rule; yields the blocks that they complete."""
        offsets, at, count = texts.offsets, 0, len(texts.offsets) - 1
        while at < count:
            room = offsets[at] + self._block_bytes - self._size
            upto = int(np.searchsorted(offsets, room, side="right")) - 1
            upto = min(upto, count, at + self._max_documents - len(self.block.lengths))
            if upto > at:
                lengths = np.diff(offsets[at : upto + 1]).tolist()
                self.block.add(texts.text[offsets[at] : offsets[upto]], lengths)
                self._size += int(offsets[upto] - offsets[at])
                self._records += upto - at
                at = upto
            elif self.block.lengths:
                yield self._start_over()
            else:  # larger than a block
                yield from self.add(texts.text[offsets[at] : offsets[at + 1]].tobytes())
                at += 1


def _pieces(
    document: bytes, block_bytes: int, cut: Callable[[bytes, int], int]
) -> list[bytes] | None:
    """The document in pieces of at most block_bytes, or None if it cannot be cut."""
    pieces = []
    while len(document) > block_bytes:
        at = cut(document, block_bytes)
        if at <= 0:
            return None
        pieces.append(document[:at])
        document = document[at:]
    return [*pieces, document]
