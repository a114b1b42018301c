"""Documents into blocks: the unit that is handed to a tokenizer, and tried again.

Runs in: decompressors. Pure: a block depends on the shard's content and the configuration alone.

Whole documents are gathered until the next would not fit. A document larger than a block is cut
where the tokenizer's own pattern always cuts, and its pieces are blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.messages import BadRecord

_NAMED_BAD = 100  # bad records that a block names; the rest is only counted


@dataclass
class BlockData:
    """Documents of one block, and the bad records met while they were gathered.

    continues: the first piece goes on with the document that the previous block cut.
    begins: documents that begin in this block.
    """

    documents: list[bytes] = field(default_factory=list)
    continues: bool = False
    begins: int = 0
    num_bad: int = 0
    bad: list[BadRecord] = field(default_factory=list)

    def skip(self, record: BadRecord) -> None:
        """Count a bad record, and name it while there are few."""
        self.num_bad += 1
        if len(self.bad) < _NAMED_BAD:
            self.bad.append(record)


def blocks(
    documents: Iterable[bytes | BadRecord],
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
    """
    block, size = BlockData(), 0
    for document in documents:
        if isinstance(document, BadRecord):
            block.skip(document)
            continue
        full = size + len(document) > block_bytes or len(block.documents) == max_documents
        if full and block.documents:
            yield block
            block, size = BlockData(), 0
        if len(document) <= block_bytes:
            block.documents.append(document)
            block.begins += 1
            size += len(document)
            continue
        pieces = _pieces(document, block_bytes, cut)
        if pieces is None:
            reason = f"its {len(document)} bytes have no place where they may be cut"
            block.skip(BadRecord("a document larger than data.stream.block_bytes", reason))
            continue
        for number, piece in enumerate(pieces):
            block.documents, block.continues = [piece], number > 0
            block.begins = int(number == 0)
            yield block
            block = BlockData()
    if block.documents or block.num_bad:
        yield block


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
