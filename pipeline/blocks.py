"""Documents into blocks: the unit that is handed to a tokenizer, and tried again.

Runs in: decompressors. Pure: a block depends on the shard's content and the configuration alone.

Whole documents are gathered until the next would not fit. A document larger than a block is cut
where the tokenizer's own pattern always cuts, and its pieces are blocks of their own. Documents
come one by one, or many in one buffer: then none of them becomes a Python object of its own.

Every block says where the next one begins (messages.BlockStart): behind some records after an
entry, a point at which the shard's reader can begin. A reader yields its entries between the
documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.messages import BadRecord, BlockStart, Entry

_NAMED_BAD = 100  # bad records that a block names; the rest is only counted
_MIN_DOCUMENT_BYTES = 64  # a block of documents shorter than this on average is cut earlier


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

    def chosen(self, keep: Sequence[bool]) -> Iterator[tuple[bool, Texts]]:
        """Stretches of documents that are all kept or all left out, still in their buffer."""
        for kept, run in itertools.groupby(range(len(keep)), keep.__getitem__):
            first, *_, last = [*run] * 2
            yield kept, Texts(self.text, self.offsets[first : last + 2])


class Filtered(NamedTuple):
    """Documents that a filter has left out, in a row."""

    number: int


Item = bytes | Texts | BadRecord | Filtered | Entry
Documents = Iterator[Item]


def most_documents(block_bytes: int) -> int:
    """Documents that a block of so much text holds at most."""
    return block_bytes // _MIN_DOCUMENT_BYTES


@dataclass
class BlockData:
    """Documents of one block, and the bad records met while they were gathered.

    pieces: buffers that hold the documents' bytes one after the other; lengths: of every document
    (of its part, where one is cut). continues: the first goes on with the document that the
    previous block cut. begins: documents that begin in this block. filtered: documents left out.
    next: where the block behind it begins; set when it is whole.
    """

    pieces: list[bytes | np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    continues: bool = False
    begins: int = 0
    num_bad: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    filtered: int = 0
    next: BlockStart | None = None

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
    documents: Iterable[Item],
    *,
    block_bytes: int,
    max_documents: int,
    cut: Callable[[bytes, int], int],
    begin: BlockStart | None = None,
) -> Iterator[BlockData]:
    """Gather documents into blocks.

    Args:
        documents: UTF-8 texts; what else comes between them (bad records, filtered documents) is
            counted with the block that is being gathered.
        block_bytes: Text that a block holds at most.
        max_documents: Documents that a block holds at most.
        cut: (text, limit) → the last safe cut ≤ limit, or 0; see encoding.safe_cut.
        begin: Gather the blocks from this one on; documents come from its entry on.

    Yields:
        Blocks with at least one document each; a last one without any only if bad records or
        filtered documents are left to report.

    Raises:
        ShardError: what documents has raised. The block that was being gathered is lost with the
            rest of the shard: it would be another one if the shard healed, and a resume could not
            make the same choice.
    """
    start = begin or BlockStart(Entry(), 0)
    gathering = _Gathering(block_bytes, max_documents, cut, start)
    yield from itertools.islice(
        _gather(gathering, _behind(documents, start.records)), start.pieces, None
    )


def _gather(gathering: _Gathering, documents: Iterable[Item]) -> Iterator[BlockData]:
    for document in documents:
        match document:
            case bytes():
                yield from gathering.add(document)
            case Texts():
                yield from gathering.add_all(document)
            case BadRecord():
                gathering.skip(document)
            case Filtered():
                gathering.leave_out(document.number)
            case Entry():
                gathering.enter(document)
    last = gathering.finish()
    if last.lengths or last.num_bad or last.filtered:
        yield last


def _behind(documents: Iterable[Item], records: int) -> Documents:
    """What comes behind so many records; entries among those are none of the reader's any more."""
    rest = iter(documents)
    while records:
        document = next(rest, None)
        match document:
            case None:
                return
            case Texts() if (size := len(document.offsets) - 1) > records:
                yield Texts(document.text, document.offsets[records:])
                break
            case Filtered() if document.number > records:
                yield Filtered(document.number - records)
                break
            case Texts():
                records -= size
            case Filtered():
                records -= document.number
            case bytes() | BadRecord():
                records -= 1
    yield from rest


class _Gathering:
    """The block that is being filled, and the rule that says when it is full."""

    def __init__(
        self,
        block_bytes: int,
        max_documents: int,
        cut: Callable[[bytes, int], int],
        begin: BlockStart,
    ) -> None:
        self._block_bytes, self._max_documents, self._cut = block_bytes, max_documents, cut
        self.block, self._size = BlockData(), 0
        self._entry, self._records = begin.entry, begin.records  # met since then, of every kind

    def enter(self, entry: Entry) -> None:
        """The reader could begin here."""
        self._entry, self._records = entry, 0

    def skip(self, record: BadRecord) -> None:
        """A record that has no text."""
        self._records += 1
        self.block.skip(record)

    def leave_out(self, count: int) -> None:
        """Documents that a filter does not want."""
        self._records += count
        self.block.filtered += count

    def finish(self, pieces: int = 0) -> BlockData:
        """The block as it is; the next begins with the next record, or inside it, behind pieces."""
        full, self.block, self._size = self.block, BlockData(), 0
        full.next = BlockStart(self._entry, self._records, pieces)
        return full

    def add(self, document: bytes) -> Iterator[BlockData]:
        """One document; yields the blocks that it completes."""
        size, block = len(document), self.block
        if block.lengths and (
            self._size + size > self._block_bytes or len(block.lengths) == self._max_documents
        ):
            yield self.finish()
        if size <= self._block_bytes:
            self._records += 1
            self.block.add(document, [size])
            self._size += size
            return
        pieces = _pieces(document, self._block_bytes, self._cut)
        if pieces is None:
            reason = (
                f"its {size} bytes are more than data.stream.block_bytes ({self._block_bytes}) and "
                "have no place where they may be cut"
            )
            number = self._entry.records + self._records + 1
            self.skip(BadRecord(f"record {number}", reason))
            return
        for number, piece in enumerate(pieces):
            self.block.pieces, self.block.lengths = [piece], [len(piece)]
            self.block.continues, self.block.begins = number > 0, int(number == 0)
            last = number == len(pieces) - 1
            self._records += last
            yield self.finish(0 if last else number + 1)

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
                yield self.finish()
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
