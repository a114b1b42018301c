"""A bounded hash table of pieces of text that looks up whole arrays of them at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

A piece is a key of 1, 2 or 4 words of 8 bytes, zero-filled. A key has four places, side by side;
a new one takes an empty place, or else throws out one of the four at random. So a table never
grows, and an insertion costs the same on an endless stream of new pieces; pieces that come often
are soon back when they were thrown out.
"""

from __future__ import annotations

import numpy as np

WORD_BYTES = 8
MISSING = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # the value of a key that is not there

_PLACES_LOG2 = 2
_PLACES = 1 << _PLACES_LOG2
_INSERT_ROUNDS = 3
_NO_KEY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # not UTF-8, so no piece
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64
)
# By the number of bytes of a word that belong to a piece. Of a piece that is too long for a key
# of one word nothing is taken: 0 is the key that is never looked for.
_WORD_MASKS = np.array([(1 << 8 * length) - 1 for length in range(WORD_BYTES + 1)], np.uint64)
_SHORT_MASKS = np.append(_WORD_MASKS, np.uint64(0))


def words_of(text: bytes) -> np.ndarray:
    """The word that starts at each byte of a text but the last 7: a view, not aligned."""
    return np.ndarray((len(text) - WORD_BYTES + 1,), "<u8", text, strides=(1,))


def keys_of(
    words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_words: int
) -> list[np.ndarray]:
    """The keys of pieces.

    Args:
        words: See words_of; they reach num_words words behind every start.
        starts: Where the pieces start, shape (n,).
        lengths: How long they are; longer ones than num_words get keys of 0 if that is 1.
        num_words: Words of a key.

    Returns:
        num_words arrays of shape (n,), uint64.
    """
    masks = _SHORT_MASKS if num_words == 1 else _WORD_MASKS
    keys = []
    for first in range(0, WORD_BYTES * num_words, WORD_BYTES):
        key = words[starts + first if first else starts]
        key &= np.take(masks, lengths - first if first else lengths, mode="clip")
        keys.append(key)
    return keys


class WordTable:
    """Values of pieces of up to 8 bytes.

    A place is a word: what of the key's hash its number does not say, and a code. Multiplying by
    an odd number loses nothing, so the place says exactly which key is there; the code is the
    value itself where it is small, as single tokens are.

    Args:
        slots_log2: Logarithm of the number of places, each of 16 bytes.
    """

    def __init__(self, slots_log2: int) -> None:
        self._shift = np.uint64(64 - slots_log2)
        self._code_bits = np.uint64(slots_log2 - _PLACES_LOG2)
        self._other = np.uint64((1 << int(self._code_bits)) - 2)  # the value is no code
        self._entries = np.empty(1 << slots_log2, np.uint64)
        self.values = np.empty(1 << slots_log2, np.uint64)  # 0 where a place is empty
        self._turn = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries[:] = _NO_KEY
        self.values[:] = 0

    def find(self, keys: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look keys up.

        Args:
            keys: Shape (n,), uint64; 0 is never found.
            codes: To be filled with the small values, shape (n,), any type that they fit.

        Returns:
            Indices of the other keys, rising, and their values; MISSING if they are not there.
        """
        hashed = keys * _MULTIPLIERS[0]
        slots = (hashed >> self._shift).view(np.int64)
        hashed <<= self._code_bits
        entries = np.take(self._entries, slots, mode="clip")
        entries ^= hashed  # what is left of the right one is its code
        np.copyto(codes, entries, casting="unsafe")
        at = np.flatnonzero(entries >= self._other)
        entries, hashed = np.take(entries, at, mode="clip"), np.take(hashed, at, mode="clip")
        values = np.full(len(at), MISSING)
        other = np.flatnonzero(entries == self._other)
        values[other] = np.take(self.values, slots[at[other]], mode="clip")
        rest = np.flatnonzero((entries > self._other) & (hashed != 0))
        slots, hashed, entries = slots[at[rest]], hashed[rest], entries[rest]
        entries ^= hashed
        for place in range(1, _PLACES):
            # Places are taken in this order and never left: behind an empty one there is nothing.
            taken = np.flatnonzero(entries != _NO_KEY)
            if not taken.size:
                break
            rest, slots, hashed = rest[taken], slots[taken], hashed[taken]
            entries = np.take(self._entries, slots ^ place, mode="clip")
            right = (entries ^ hashed) <= self._other
            found = np.flatnonzero(right)
            values[rest[found]] = np.take(self.values, slots[found] ^ place, mode="clip")
            entries[found] = _NO_KEY  # done
        return at, values

    def insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add keys that are not in the table; a few may be lost to others that came with them."""
        hashed = keys * _MULTIPLIERS[0]
        first = (hashed >> self._shift).view(np.int64)
        entries = (hashed << self._code_bits) | np.minimum(values, self._other)
        for _ in range(_INSERT_ROUNDS):
            slots = first.copy()
            taken = np.flatnonzero(self._entries[slots] != _NO_KEY)
            for place in range(1, _PLACES):
                slots[taken] = first[taken] ^ place
                taken = taken[self._entries[slots[taken]] != _NO_KEY]
            self._turn += 1
            slots[taken] ^= (taken + self._turn) % _PLACES
            self._entries[slots] = entries
            self.values[slots] = values
            lost = self._entries[slots] != entries  # two keys went to one place
            if not lost.any():
                return
            first, entries, values = first[lost], entries[lost], values[lost]


class PieceTable:
    """Values of longer pieces.

    Args:
        num_words: Words of a key.
        slots_log2: Logarithm of the number of places, each of 16 bytes per word.
    """

    def __init__(self, num_words: int, slots_log2: int) -> None:
        self._num_words = num_words
        self._shift = np.uint64(64 - slots_log2)
        self._rows = np.empty((1 << slots_log2, 2 * num_words), np.uint64)
        self._found = np.empty((0, 2 * num_words), np.uint64)
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

    def find(self, keys: list[np.ndarray]) -> np.ndarray:
        """Look keys up.

        Args:
            keys: Their words, each of shape (n,), uint64.

        Returns:
            Values, shape (n,), uint64; MISSING for keys that are not in the table, and anything
            for those whose first word is 0.
        """
        slots = self._slots(keys)
        if len(self._found) < len(slots):
            self._found = np.empty((len(slots), self._rows.shape[1]), np.uint64)
        rows = self._found[: len(slots)]
        np.take(self._rows, slots, axis=0, mode="clip", out=rows)
        values = rows[:, self._num_words].copy()
        differ = self._differ(rows, keys)
        differ &= keys[0] != 0
        missed = np.flatnonzero(differ)
        there = rows[missed, 0]
        for place in range(1, _PLACES):
            # Places are taken in this order and never left: behind an empty one there is nothing.
            taken = there != _NO_KEY
            values[missed[~taken]] = MISSING
            missed = missed[taken]
            if not missed.size:
                return values
            rows = np.take(self._rows, slots[missed] ^ place, axis=0, mode="clip")
            values[missed] = rows[:, self._num_words]
            differ = self._differ(rows, [key[missed] for key in keys])
            missed, there = missed[differ], rows[differ, 0]
        values[missed] = MISSING
        return values

    def insert(self, keys: list[np.ndarray], values: np.ndarray) -> None:
        """Add keys that are not in the table; a few may be lost to others that came with them."""
        first = self._slots(keys)
        rows = np.zeros((len(first), 2 * self._num_words), np.uint64)
        for column, key in enumerate(keys):
            rows[:, column] = key
        rows[:, self._num_words] = values
        for _ in range(_INSERT_ROUNDS):
            slots = first.copy()
            taken = np.flatnonzero(self._rows[slots, 0] != _NO_KEY)
            for place in range(1, _PLACES):
                slots[taken] = first[taken] ^ place
                taken = taken[self._rows[slots[taken], 0] != _NO_KEY]
            slots[taken] ^= self._random.integers(0, _PLACES, len(taken))
            self._rows[slots] = rows
            lost = self._differ(self._rows[slots], list(rows.T))  # two keys went to one place
            if not lost.any():
                return
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
