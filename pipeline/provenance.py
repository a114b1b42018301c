"""Which documents the tokens between two positions of a lane are.

Runs in: processes of `where`. Reads shards that are on this disk, starts nothing.

The stream is that of the run, made by the same code: the lane's turns (lanes.py), a shard's
documents (codecs.py, filters.py, holdout.py), its blocks (blocks.py), their tokens (encoding.py),
a block's position the sum of the counts before it, and what the cursor says is left out. Only the
ring and the processes around it are missing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from pipeline import encoding, filters, holdout
from pipeline.blocks import BlockData, Documents, Filtered, Texts, blocks
from pipeline.codecs import open_documents, open_records
from pipeline.encoding import Encoder
from pipeline.messages import BadRecord, Entry, LaneCursor, Skip

FIELDS = ("id", "url")  # by which people know a document, where its record has them


class Reading(NamedTuple):
    """What of the configuration decides a shard's blocks."""

    text_field: str
    block_bytes: int
    max_documents: int
    encoding: str
    vocab_size: int | None
    share: float
    where: str
    min_chars: int | None
    max_chars: int | None


class Part(NamedTuple):
    """Consecutive tokens of one document.

    window: the one of the wanted windows that they lie in. start, end: positions in the lane, its
    end-of-text token included. record: which of the shard's records, from 0, also those
    counted that are bad, filtered or held out. first_byte, last_byte: which bytes of its text these
    tokens spell, [first, last).
    """

    window: int
    start: int
    end: int
    block: int
    record: int
    first_byte: int
    last_byte: int


class Stretch(NamedTuple):
    """What one shard gives to the wanted positions of a lane.

    position: where the lane stands behind what was read. ended: the shard is at its end.
    tokens: from the first wanted position on. fields: record → what of FIELDS it has.
    """

    position: int
    ended: bool
    parts: tuple[Part, ...]
    tokens: np.ndarray
    fields: dict[int, dict[str, str]]


class Wanted(NamedTuple):
    """Windows of a lane, by their first positions, in order; tokens of each; and the position at
    which reading stops."""

    windows: tuple[int, ...]
    tokens: int
    end: int

    @property
    def start(self) -> int:
        """The first position that is asked for."""
        return self.windows[0] if self.windows else self.end


def stretch(
    path: str, name: str, reading: Reading, at: LaneCursor, skips: tuple[Skip, ...], wanted: Wanted
) -> Stretch:
    """Read one shard from a cursor on, as far as it is wanted.

    Args:
        path: The shard's file.
        name: Its name, for messages.
        reading: See there.
        at: Block and token in this shard, and the position of that token.
        skips: Of this turn of the shard.
        wanted: Windows that are asked for.

    Raises:
        ShardError: the shard cannot be read so far.
    """
    encoder, widths = _encoder(reading)
    left_out = {skip.block for skip in skips if not skip.rest}
    end_block = min((skip.block for skip in skips if skip.rest), default=None)
    records: list[int] = []
    position, begun, ended = at.position - at.token, _Begun(0, -1), True
    parts: list[Part] = []
    pieces = [np.zeros(0, encoder.dtype)]
    found = _blocks(path, name, reading, records)
    for number, block in enumerate(itertools.islice(found, end_block)):
        before, begun = begun, begun.after(block)
        if number < at.block or number in left_out:
            continue
        if position >= wanted.end:
            ended = False
            break
        tokens = _encode(encoder, block)
        if position + len(tokens) > wanted.start:
            spelled = list(_spelled(tokens, widths, encoder.eot, block.continues, before))
            for window in wanted.windows:
                parts += _clip(spelled, position, number, records, (window, window + wanted.tokens))
            first, last = (max(0, one - position) for one in (wanted.start, wanted.end))
            pieces.append(tokens[first:last])
        position += len(tokens)
    fields = fields_of(path, name, reading.text_field, {part.record for part in parts})
    return Stretch(position, ended, tuple(parts), np.concatenate(pieces), fields)


# ── documents and blocks ────────────────────────────────────────────────────────────────────


def _blocks(path: str, name: str, reading: Reading, records: list[int]) -> Iterator[BlockData]:
    """The shard's blocks; records gets the record number of every document in them."""
    where = filters.Where(reading.where) if reading.where else None
    documents = open_documents(path, name, reading.text_field, where=where)
    chosen = _numbered(documents, reading, records)
    where_safe = encoding.safe_cut(reading.encoding)

    def cut(document: bytes, limit: int) -> int:
        at = where_safe(document, limit)
        if at <= 0:  # too large, and it cannot be cut: the newest document is a bad record
            records.pop()
        return at

    for block in blocks(
        chosen, block_bytes=reading.block_bytes, max_documents=reading.max_documents, cut=cut
    ):
        if block.lengths:  # else only bad records are left
            yield block


def _numbered(
    documents: Documents, reading: Reading, records: list[int]
) -> Iterator[bytes | BadRecord]:
    """The documents that are trained on, one by one."""
    number = 0
    for item in documents:
        if isinstance(item, Filtered):
            number += item.number
        elif not isinstance(item, Entry):
            for one in item.one_by_one() if isinstance(item, Texts) else (item,):
                for document in _wanted(one, reading):
                    if isinstance(document, bytes):
                        records.append(number)
                    yield document
                number += 1


def _wanted(document: bytes | BadRecord, reading: Reading) -> Iterator[bytes | BadRecord]:
    """The document, if neither a filter nor the hold-out takes it away."""
    chosen: Documents = iter((document,))
    if reading.min_chars is not None or reading.max_chars is not None:
        chosen = filters.by_length(chosen, reading.min_chars, reading.max_chars)
    if reading.share > 0:
        chosen = holdout.select(chosen, reading.share, held_out=False)
    for one in chosen:
        if isinstance(one, bytes | BadRecord):
            yield one


class _Begun(NamedTuple):
    """How far the documents are: bytes of the newest one in earlier blocks, and its number among
    the chosen ones."""

    bytes_before: int
    document: int

    def after(self, block: BlockData) -> _Begun:
        """Behind a block more."""
        size = block.lengths[-1]
        if block.continues and len(block.lengths) == 1:
            size += self.bytes_before
        return _Begun(size, self.document + block.begins)


# ── tokens ──────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _encoder(reading: Reading) -> tuple[Encoder, np.ndarray]:
    """The encoder, and how many bytes each token spells, shape (vocab_size,); end-of-text none."""
    encoder = encoding.load(reading.encoding, reading.vocab_size)
    widths = np.zeros(encoder.vocab_size, np.int64)
    for token, rank in encoding.whole(reading.encoding)._mergeable_ranks.items():
        if rank < encoder.vocab_size:
            widths[rank] = len(token)
    widths[encoder.eot] = 0
    return encoder, widths


def _encode(encoder: Encoder, block: BlockData) -> np.ndarray:
    text = np.frombuffer(b"".join(block.pieces), np.uint8)
    offsets = np.concatenate(([0], np.cumsum(block.lengths, dtype=np.int64)))
    return encoder.encode_block(text, offsets, block.continues)


class _Spelled(NamedTuple):
    """A document's tokens in a block: [first, end), its number among the chosen documents, how
    many bytes of it came before, and those up to the end of each token."""

    first: int
    document: int
    bytes_before: int
    upto_bytes: np.ndarray


def _spelled(
    tokens: np.ndarray, widths: np.ndarray, eot: int, continues: bool, before: _Begun
) -> Iterator[_Spelled]:
    starts = np.flatnonzero(tokens == eot).tolist()
    if continues:
        starts = [0, *starts]
    document = before.document + (not continues)
    for number, (first, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        earlier = before.bytes_before if continues and number == 0 else 0
        upto = earlier + np.cumsum(widths[tokens[first:end]])
        yield _Spelled(first, document + number, earlier, upto)


def _clip(
    spelled: Iterable[_Spelled],
    base: int,
    block: int,
    records: list[int],
    window: tuple[int, int],
) -> Iterator[Part]:
    """What of a block's documents lies in a window."""
    for one in spelled:
        start, end = base + one.first, base + one.first + len(one.upto_bytes)
        first, last = max(start, window[0]), min(end, window[1])
        if first < last:
            begins = first == start
            yield Part(
                window=window[0],
                start=first,
                end=last,
                block=block,
                record=records[one.document],
                first_byte=one.bytes_before if begins else int(one.upto_bytes[first - start - 1]),
                last_byte=int(one.upto_bytes[last - start - 1]),
            )


# ── what else the records say ───────────────────────────────────────────────────────────────


def fields_of(
    path: str, name: str, text_field: str, records: set[int]
) -> dict[int, dict[str, str]]:
    """What of FIELDS these records of a shard have, by record."""
    found: dict[int, dict[str, str]] = {}
    left, number = sorted(records, reverse=True), 0
    if not left:
        return found
    for item in open_records(path, name, text_field):
        count = item.num_rows if isinstance(item, pa.RecordBatch) else 1
        while left and left[-1] < number + count:
            record = left.pop()
            found[record] = _named(item, record - number)
        number += count
        if not left:
            break
    return found


def _named(item: bytes | pa.RecordBatch | BadRecord, row: int) -> dict[str, str]:
    match item:
        case BadRecord():
            return {}
        case bytes():
            values = msgspec.json.decode(item)
        case _:
            names = [name for name in FIELDS if name in item.schema.names]
            values = {name: item.column(name)[row].as_py() for name in names}
    return {name: str(values[name]) for name in FIELDS if values.get(name) is not None}
