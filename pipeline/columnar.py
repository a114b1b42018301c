"""Token ids of a whole block at once: the same as tiktoken's, several times faster.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

A byte-pair encoding encodes each piece of its pattern on its own, and text repeats its pieces. So
a block is split into pieces with array operations (pieces), each piece is looked up in a table
(piece_cache), and only the distinct pieces that are not in it go through tiktoken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from pipeline import ragged
from pipeline.merges import MAX_BYTES, Merges
from pipeline.piece_cache import (
    KEY_WORDS,
    MAX_PIECE_BYTES,
    ONE,
    TWO,
    WORD_BYTES,
    PieceTable,
    TokenStore,
)
from pipeline.pieces import PAD_BYTES

if TYPE_CHECKING:
    import tiktoken

_CHUNK_BYTES = 1 << 18  # what the arrays of one step hold stays in the processor's cache
_UINT16_IDS = 1 << 16

# Slots (log2) of the tables of pieces up to 8, 16 and 32 bytes: 8 + 4 + 1 MiB
_SLOTS_LOG2 = (19, 17, 14)
_STORED_TOKENS = 1 << 21  # 8 MiB

# By a piece's length, what of a word of its bytes belongs to it.
_WORD_MASKS = np.array([(1 << 8 * length) - 1 for length in range(WORD_BYTES + 1)], np.uint64)
_SHORT_MASKS = np.append(_WORD_MASKS, np.uint64(0))  # longer pieces get the key that is never found
_SEPARATOR = 0


class Splitter(Protocol):
    """Finds the pieces of a pattern; see pieces.Gpt2Splitter."""

    def starts(self, text: bytes, bounds: np.ndarray) -> np.ndarray:
        """Where the pieces of documents start."""
        ...


class ColumnarEncoder:
    """Encodes blocks; see encoding.Encoder.

    Args:
        encoding: Whose ids these are.
        splitter: Of exactly the encoding's pattern.
        cut: Where a long document may be cut; see encoding.safe_cut.
        eot: End-of-text token.
        vocab_size: Ids are below this.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        splitter: Splitter,
        cut: Callable[[bytes, int], int],
        eot: int,
        vocab_size: int,
    ) -> None:
        self._encoding, self._splitter, self._cut = encoding, splitter, cut
        self._pieces = _piece_encoding(encoding)
        self.eot, self.vocab_size = eot, vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= _UINT16_IDS else np.uint32)
        self._tables = [
            PieceTable(words, slots) for words, slots in zip(KEY_WORDS, _SLOTS_LOG2, strict=True)
        ]
        self._store = TokenStore(_STORED_TOKENS)
        self._values = np.empty(0, np.uint64)
        self._separator = encoding._mergeable_ranks[bytes([_SEPARATOR])]
        self._merges = Merges(encoding._mergeable_ranks)
        self._learn_vocabulary()

    def decode(self, ids: list[int]) -> str:
        """See encoding.Encoder."""
        return self._encoding.decode(ids, errors="replace")

    def encode_block(self, text: np.ndarray, offsets: np.ndarray, continues: bool) -> np.ndarray:
        """See encoding.Encoder."""
        raw = text[offsets[0] : offsets[-1]].tobytes()
        offsets = offsets - offsets[0]
        _check_utf8(raw, offsets)
        if self._store.full:
            self._store.compact(self._tables)
            self._learn_vocabulary()
        values, document_pieces = self._look_up(raw, offsets)
        return self._gather(values, document_pieces[1:] if continues else document_pieces)

    def _look_up(self, raw: bytes, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of all pieces of a block (see piece_cache), and each document's first piece."""
        if len(self._values) < len(raw):
            self._values = np.empty(len(raw), np.uint64)
        num_pieces = 0
        document_pieces = []
        missed: list[np.ndarray] = []
        for begin, end in self._chunks(raw, offsets):
            first, last = np.searchsorted(offsets[:-1], (begin, end))
            inner = offsets[first:last] - begin
            text = raw[begin:end] + bytes(PAD_BYTES)
            starts = self._splitter.starts(text, np.concatenate([[0], inner, [end - begin]]))
            document_pieces.append(num_pieces + np.searchsorted(starts, inner))
            values = self._values[num_pieces : num_pieces + len(starts)]
            missing, lengths = self._find(text, starts, values)
            missed.append(np.stack([missing + num_pieces, starts[missing] + begin, lengths]))
            num_pieces += len(starts)
        behind = np.full(np.count_nonzero(offsets[:-1] == len(raw)), num_pieces)
        if missed:
            pieces, starts, lengths = np.concatenate(missed, axis=1)
            if len(pieces):
                self._values[pieces] = self._encode(raw, starts, lengths)
        return self._values[:num_pieces], np.concatenate([*document_pieces, behind])

    def _chunks(self, raw: bytes, offsets: np.ndarray) -> Iterator[tuple[int, int]]:
        """Whole documents, or parts of one, of about _CHUNK_BYTES."""
        begin = 0
        while begin < len(raw):
            limit = begin + _CHUNK_BYTES
            after = int(np.searchsorted(offsets, limit, side="right"))
            if after == len(offsets):
                end = len(raw)
            elif offsets[after - 1] > begin + _CHUNK_BYTES // 2:
                end = int(offsets[after - 1])
            else:
                document_end = int(offsets[after])
                cut = self._cut(memoryview(raw)[begin:document_end], _CHUNK_BYTES)
                end = begin + cut if cut else document_end
            yield begin, end
            begin = end

    def _find(
        self, text: bytes, starts: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look the pieces of a chunk up.

        Args:
            text: The chunk and PAD_BYTES.
            starts: Where its pieces start.
            values: Receives the values, shape of starts.

        Returns:
            The indices of the pieces that are in no table, and their lengths.
        """
        size = len(text) - PAD_BYTES
        words = np.ndarray((size,), "<u8", text, strides=(1,)).copy()
        lengths = np.diff(starts, append=size)
        # Words are filled up with zeros, so a piece that has some is never looked up.
        key_lengths = lengths
        if text.find(0, 0, size) >= 0:
            zeros = np.flatnonzero(np.frombuffer(text, np.uint8, size) == 0)
            key_lengths = lengths.copy()
            key_lengths[np.searchsorted(starts, zeros, side="right") - 1] = MAX_PIECE_BYTES + 1

        keys = [np.take(words, starts, mode="clip")]
        keys[0] &= np.take(_SHORT_MASKS, key_lengths, mode="clip")
        found, missed = self._tables[0].find(keys)
        values[:] = found
        long = missed[key_lengths[missed] > WORD_BYTES]
        absent = [missed[key_lengths[missed] <= WORD_BYTES]]
        for table, num_words in zip(self._tables[1:], KEY_WORDS[1:], strict=True):
            fits = key_lengths[long] <= WORD_BYTES * num_words
            here, long = long[fits], long[~fits]
            if here.size:
                values[here], missed = table.find(
                    _keys(words, starts[here], lengths[here], num_words)
                )
                absent.append(here[missed])
        missing = np.concatenate([*absent, long])
        return missing, lengths[missing]

    def _encode(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Values of pieces that are in no table: tiktoken's, learned for the next time."""
        text = np.frombuffer(raw, np.uint8)[ragged.positions(starts, lengths)]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        array = ragged.binary_array(text, bounds).dictionary_encode()
        _, offsets, data = array.dictionary.buffers()
        bounds = np.frombuffer(offsets, np.int64)[: len(array.dictionary) + 1]
        text = np.frombuffer(data, np.uint8)[: bounds[-1]]
        starts, lengths = bounds[:-1], np.diff(bounds)
        values = np.empty(len(starts), np.uint64)
        low = 0
        for high, bpe in (
            (WORD_BYTES, self._merges.encode),
            (MAX_BYTES, self._merges.encode),
            (len(raw), self._tiktoken),
        ):
            here = np.flatnonzero((low < lengths) & (lengths <= high))
            if here.size:
                values[here] = self._store.add(*bpe(text, starts[here], lengths[here]))
            low = high
        self._learn(text, bounds, values)
        return values[np.asarray(array.indices)]

    def _tiktoken(
        self, text: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As Merges.encode, for pieces of any length."""
        text = text[ragged.positions(starts, lengths)]
        if not text.all():  # they contain the separator
            bounds = itertools.pairwise([0, *np.cumsum(lengths)])
            ids = [self._encoding._encode_single_piece(text[a:b].tobytes()) for a, b in bounds]
            return np.array(list(itertools.chain(*ids))), np.array(list(map(len, ids)))
        joined = np.full(len(text) + len(lengths), _SEPARATOR, np.uint8)
        joined[np.arange(len(text)) + np.repeat(np.arange(len(lengths)), lengths)] = text
        ids = self._pieces.encode_to_numpy(joined.tobytes().decode(), disallowed_special=())
        separators = np.flatnonzero(ids == self._separator)
        counts = np.diff(separators, prepend=-1) - 1
        return np.delete(ids, separators), counts

    def _learn(self, pieces: np.ndarray, bounds: np.ndarray, values: np.ndarray) -> None:
        """Put distinct pieces that are in no table there."""
        text = np.concatenate([pieces, np.zeros(PAD_BYTES, np.uint8)])
        words = np.ndarray((len(pieces),), "<u8", text, strides=(1,)).copy()
        starts, lengths = bounds[:-1], np.diff(bounds)
        zeros = np.flatnonzero(pieces == 0)
        lengths[np.searchsorted(bounds, zeros, side="right") - 1] = MAX_PIECE_BYTES + 1
        low = 0
        for table, num_words in zip(self._tables, KEY_WORDS, strict=True):
            high = WORD_BYTES * num_words
            here = np.flatnonzero((low < lengths) & (lengths <= high))
            if here.size:
                table.insert(_keys(words, starts[here], lengths[here], num_words), values[here])
            low = high

    def _learn_vocabulary(self) -> None:
        """Pieces that are one token."""
        tokens = list(self._encoding._mergeable_ranks)
        bounds = np.cumsum([0, *map(len, tokens)])
        ids = np.array(list(self._encoding._mergeable_ranks.values()), np.uint64)
        self._learn(np.frombuffer(b"".join(tokens), np.uint8), bounds, ids | ONE)

    def _gather(self, values: np.ndarray, document_pieces: np.ndarray) -> np.ndarray:
        """Token ids of all pieces, and the end of text before each document."""
        several = np.flatnonzero(values >= TWO)
        counts = (values[several] >> np.uint64(32)).view(np.int64)
        extra = np.concatenate([[0], np.cumsum(counts - 1)])
        before = np.searchsorted(several, document_pieces)  # the pieces of several tokens
        num_documents = len(document_pieces)
        documents = np.repeat(
            np.arange(num_documents + 1), np.diff(before, prepend=0, append=len(several))
        )
        ids = np.empty(len(values) + extra[-1] + num_documents, self.dtype)
        single = np.ones(len(ids), bool)
        eots = document_pieces + extra[before] + np.arange(num_documents)
        ids[eots] = self.eot
        single[eots] = False
        if several.size:
            at = ragged.positions(several + extra[:-1] + documents, counts)
            ids[at] = self._store.tokens(values[several])
            single[at] = False
        ids[single] = values.astype(self.dtype)[values < TWO]
        return ids


def _keys(
    words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_words: int
) -> list[np.ndarray]:
    """Keys of pieces that are at most num_words words long; words holds one for every byte."""
    keys = []
    for first in range(0, WORD_BYTES * num_words, WORD_BYTES):
        key = np.take(words, starts + first, mode="clip")
        key &= np.take(_WORD_MASKS, lengths - first, mode="clip")
        keys.append(key)
    return keys


def _piece_encoding(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The same ranks with a pattern that splits at zero bytes only: many pieces in one call."""
    import tiktoken

    return tiktoken.Encoding(
        f"{encoding.name}-pieces",
        pat_str=r"[^\x00]+|\x00",
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={},
    )


def _check_utf8(raw: bytes, offsets: np.ndarray) -> None:
    """Raises: UnicodeDecodeError: some document is not UTF-8."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets, np.int64)), pa.py_buffer(raw)]
    documents = pa.LargeStringArray.from_buffers(len(offsets) - 1, *buffers[1:])
    try:
        documents.validate(full=True)
    except pa.ArrowInvalid:
        for begin, end in itertools.pairwise(offsets):
            raw[begin:end].decode()
        raise
