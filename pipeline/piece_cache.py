"""Pieces of text and their tokens: a bounded table that looks up whole arrays of pieces at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

A piece of up to 32 bytes is a key of 1, 2 or 4 words of 8 bytes, zero-filled. A table has two
places for each key, side by side; a new key takes an empty one, or else throws out one of the two
at random. So the table never grows and an insertion costs the same on an endless stream of new
pieces; pieces that come often are soon back when they were thrown out.
"""

from __future__ import annotations

import numpy as np

from pipeline import ragged

WORD_BYTES = 8
KEY_WORDS = (1, 2, 4)  # of the three tables
MAX_PIECE_BYTES = WORD_BYTES * KEY_WORDS[-1]

# A value is a number of tokens in the high half, and in the low half the token itself if it is
# one, or else the place of the first one in the store. 0 is no value.
_COUNT_SHIFT = np.uint64(32)
ONE = np.uint64(1 << 32)
TWO = np.uint64(2 << 32)

_INSERT_ROUNDS = 3
_NO_KEY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # not UTF-8, so no piece
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)


class PieceTable:
    """Values of pieces whose keys have a given number of words.

    Args:
        num_words: Words of a key.
        slots_log2: Logarithm of the number of places.
    """

    def __init__(self, num_words: int, slots_log2: int) -> None:
        self._num_words = num_words
        self._shift = np.uint64(64 - slots_log2)
        self._rows = np.empty((1 << slots_log2, 2 * num_words), np.uint64)
        self._random = np.random.default_rng(0)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._rows[:] = 0
        self._rows[:, 0] = _NO_KEY

    @property
    def values(self) -> np.ndarray:
        """Every value, a view of shape (slots,); 0 where a place is empty."""
        return self._rows[:, self._num_words]

    def find(self, keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Look keys up.

        Args:
            keys: Their words, each of shape (n,), uint64; a first word of 0 is never found.

        Returns:
            Values, shape (n,), uint64, and the indices of the keys that are not in the table,
            whose values mean nothing.
        """
        slots = self._slots(keys)
        rows = np.take(self._rows, slots, axis=0, mode="clip")
        values = rows[:, self._num_words].copy()
        missed = np.flatnonzero(self._differ(rows, keys))
        if missed.size:
            keys = [key[missed] for key in keys]
            rows = np.take(self._rows, slots[missed] ^ 1, axis=0, mode="clip")
            values[missed] = rows[:, self._num_words]
            missed = missed[self._differ(rows, keys)]
        return values, missed

    def insert(self, keys: list[np.ndarray], values: np.ndarray) -> None:
        """Add keys that are not in the table; a few may be lost to others that came with them."""
        first = self._slots(keys)
        rows = np.zeros((len(first), 2 * self._num_words), np.uint64)
        for column, key in enumerate(keys):
            rows[:, column] = key
        rows[:, self._num_words] = values
        for _ in range(_INSERT_ROUNDS):
            second = first ^ 1
            taken = self._rows[first, 0] != _NO_KEY
            full = taken & (self._rows[second, 0] != _NO_KEY)
            coin = self._random.integers(0, 2, len(first), np.uint8)
            slots = np.where(np.where(full, coin, taken), second, first)
            self._rows[slots] = rows
            lost = (self._rows[slots] != rows).any(axis=1)  # two keys went to one place
            first, rows = first[lost], rows[lost]

    def _slots(self, keys: list[np.ndarray]) -> np.ndarray:
        hashed = keys[0] * _MULTIPLIERS[0]
        for key, multiplier in zip(keys[1:], _MULTIPLIERS[1:], strict=False):
            hashed += key * multiplier
        hashed >>= self._shift
        return hashed.view(np.int64)

    def _differ(self, rows: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        differ = rows[:, 0] != keys[0]
        for column in range(1, self._num_words):
            differ |= rows[:, column] != keys[column]
        return differ


class TokenStore:
    """Token ids of the pieces that are several tokens, one after another."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._ids = np.empty(capacity, np.uint32)
        self._used = 0

    @property
    def full(self) -> bool:
        """It holds more than it should after a block; see compact."""
        return self._used > self._capacity

    def add(self, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Keep the ids of some pieces, joined. Returns: the pieces' values."""
        end = self._used + len(ids)
        if end > len(self._ids):
            grown = np.empty(end, np.uint32)
            grown[: self._used] = self._ids[: self._used]
            self._ids = grown
        self._ids[self._used : end] = ids
        ends = np.cumsum(counts)
        first = ends - counts
        place = np.where(counts == 1, ids[first], first + self._used)
        self._used = end
        return (counts.astype(np.uint64) << _COUNT_SHIFT) | place.astype(np.uint64)

    @staticmethod
    def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place of the first token, and number of tokens."""
        place = (values & np.uint64(0xFFFF_FFFF)).view(np.int64)
        return place, (values >> _COUNT_SHIFT).view(np.int64)

    def tokens(self, values: np.ndarray) -> np.ndarray:
        """The ids of values of several tokens each, joined."""
        return self._ids[ragged.positions(*self._split(values))]

    def compact(self, tables: list[PieceTable]) -> None:
        """Keep only what the tables still refer to; or nothing, if that is most of it."""
        places = [np.flatnonzero(table.values >= TWO) for table in tables]
        values = np.concatenate(
            [table.values[at] for table, at in zip(tables, places, strict=True)]
        )
        ids = self.tokens(values)
        self._ids, self._used = np.empty(self._capacity, np.uint32), 0
        if len(ids) > self._capacity // 2:
            for table in tables:
                table.clear()
            return
        values = self.add(ids, (values >> _COUNT_SHIFT).astype(np.int64))
        first = 0
        for table, at in zip(tables, places, strict=True):
            table.values[at] = values[first : first + len(at)]
            first += len(at)
