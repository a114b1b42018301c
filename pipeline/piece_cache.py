"""Pieces of text and their token ids, as many as fit into a given amount of memory.

Runs in: tokenizers. Pure: no I/O, no clock, no process.
"""

from __future__ import annotations

import numpy as np

from pipeline import ragged
from pipeline.piece_table import (
    WORD_BYTES,
    PieceTable,
    ShortTable,
    first_words,
    keys_of,
    word_of,
    words_of,
)

# A value is a token, or if there are several, their number in the high half, and the place of the
# first one in the store in the low half.
_COUNT_SHIFT = np.uint64(32)
_LOW = np.uint64(0xFFFF_FFFF)
TWO = np.uint64(2 << 32)

KEY_WORDS = (2, 4)  # of the tables: pieces of up to 16 and 32 bytes
_SHORT_BYTES = WORD_BYTES * KEY_WORDS[0]
MAX_PIECE_BYTES = WORD_BYTES * KEY_WORDS[-1]
_SLOTS_LOG2 = (20, 14)  # 24 and 1 MiB
_STORED_TOKENS = 1 << 21  # 8 MiB
_MAX_LOAD = 1 / 8  # of a table by the vocabulary alone
_PAD_WORDS = WORD_BYTES * (KEY_WORDS[-1] - 1)


class PieceCache:
    """Token ids of pieces of up to 32 bytes.

    Args:
        ranks: Token id of every token's bytes: pieces that are one token are known from the start
            and may be forgotten as any other.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._vocabulary = []
        slots_log2 = []
        low = 0
        for num_words, least in zip(KEY_WORDS, _SLOTS_LOG2, strict=True):
            high = WORD_BYTES * num_words
            # the lowest ranks last: they come most often, and get the first places
            known = [(t, r) for t, r in ranks.items() if low < len(t) <= high and 0 not in t][::-1]
            keys = ragged.padded([token for token, _ in known], high).view("<u8")
            self._vocabulary.append((list(keys.T), np.array([r for _, r in known], np.uint32)))
            slots_log2.append(max(least, int(len(known) / _MAX_LOAD).bit_length()))
            low = high
        self._short = ShortTable(slots_log2[0])
        self._wide = PieceTable(KEY_WORDS[1], slots_log2[1])
        self._tables: tuple[ShortTable | PieceTable, ...] = (self._short, self._wide)
        self._words = np.empty(0, np.uint64)
        self._ids, self._used = np.empty(0, np.uint32), 0
        self._clear()

    def find(
        self, text: bytes, starts: np.ndarray, lengths: np.ndarray, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look pieces up.

        Args:
            text: UTF-8 bytes, and WORD_BYTES more.
            starts: Where its pieces start, shape (n,).
            lengths: How long they are.
            ids: To be filled with the tokens of pieces that are one token, shape (n,).

        Returns:
            Indices of the other pieces, rising, and their values: see tokens; MISSING for the
            unknown.
        """
        size = len(text) - WORD_BYTES
        if len(self._words) < size + _PAD_WORDS:
            self._words = np.empty(size + _PAD_WORDS, np.uint64)
        words = self._words[: size + _PAD_WORDS]
        np.copyto(words[:size], words_of(text)[:size])
        words[size:] = 0
        if text.find(0, 0, size) >= 0:
            # Keys are filled up with zeros: a piece that has some might be taken for a shorter one.
            zeros = np.flatnonzero(np.frombuffer(text, np.uint8, size) == 0)
            lengths = lengths.copy()
            lengths[np.searchsorted(starts, zeros, side="right") - 1] = MAX_PIECE_BYTES + 1

        first = first_words(words, starts, lengths)
        long = np.flatnonzero(lengths > WORD_BYTES)
        sizes = lengths[long]
        wide = np.empty(0, np.int64)
        if sizes.size and sizes.max() > _SHORT_BYTES:
            fits = sizes <= _SHORT_BYTES
            wide, long, sizes = long[~fits], long[fits], sizes[fits]
        second = word_of(words, starts[long], sizes, 1)
        at, values = self._short.find(first, long, second, ids)
        wide = wide[lengths[wide] <= MAX_PIECE_BYTES]
        if wide.size:
            keys = keys_of(words, starts[wide], lengths[wide], KEY_WORDS[1])
            values[np.searchsorted(at, wide)] = self._wide.find(keys)
        single, several = np.flatnonzero(values < TWO), np.flatnonzero(values >= TWO)
        ids[at[single]] = values[single]
        return at[several], values[several]

    def tokens(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of pieces of several tokens each (values of TWO and above, but MISSING).

        Returns:
            The ids, joined, and the number of each piece's, shape of values, int64.
        """
        counts = (values >> _COUNT_SHIFT).view(np.int64)
        return self._ids[ragged.positions((values & _LOW).view(np.int64), counts)], counts

    def learn(
        self, keys: list[np.ndarray] | None, ids: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Add distinct pieces that are missing.

        Args:
            keys: Their keys, one of KEY_WORDS arrays of shape (n,); pieces without zero bytes. None
                for pieces that cannot be looked up.
            ids: Their tokens joined.
            counts: How many each has, shape (n,), int64.

        Returns:
            Their values, good until make_room.
        """
        ends = np.cumsum(counts)
        first = ends - counts
        values = (counts.view(np.uint64) << _COUNT_SHIFT) | (self._used + first).astype(np.uint64)
        single = counts == 1
        values[single] = ids[first[single]]
        self._store(ids)
        if keys is not None:
            self._tables[KEY_WORDS.index(len(keys))].insert(keys, values)
        return values

    def make_room(self) -> None:
        """Drop the tokens of forgotten pieces if the store is full; old values mean nothing then.

        If most of the store is still in use, everything but the vocabulary is forgotten.
        """
        if self._used <= _STORED_TOKENS:
            return
        places = [np.flatnonzero(table.values >= TWO) for table in self._tables]
        old = [table.values[at] for table, at in zip(self._tables, places, strict=True)]
        ids, counts = self.tokens(np.concatenate(old))
        if len(ids) > _STORED_TOKENS // 2:
            self._clear()
            return
        first = (np.cumsum(counts) - counts).astype(np.uint64)
        values = counts.astype(np.uint64) << _COUNT_SHIFT | first
        parts = np.split(values, np.cumsum([len(at) for at in places[:-1]]))
        for table, at, part in zip(self._tables, places, parts, strict=True):
            table.values[at] = part
        self._ids, self._used = np.empty(_STORED_TOKENS, np.uint32), 0
        self._store(ids)

    def _clear(self) -> None:
        """Forget everything but the vocabulary."""
        self._ids, self._used = np.empty(_STORED_TOKENS, np.uint32), 0
        for table in self._tables:
            table.clear()
        for keys, ids in self._vocabulary:
            self.learn(keys, ids, np.ones(len(ids), np.int64))
        self._used = 0  # single tokens are not looked up there

    def _store(self, ids: np.ndarray) -> None:
        end = self._used + len(ids)
        if end > len(self._ids):  # until make_room
            grown = np.empty(end, np.uint32)
            grown[: self._used] = self._ids[: self._used]
            self._ids = grown
        self._ids[self._used : end] = ids
        self._used = end
