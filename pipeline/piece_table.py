"""A bounded hash table of pieces of text that looks up whole arrays of them at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

A piece is a key of 2 or 4 words of 8 bytes, zero-filled. A key has four places, side by side;
a new one takes an empty place, or else throws out one of the four. So a table never
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
# By the number of bytes of a word that belong to a piece.
_WORD_MASKS = np.array([(1 << 8 * length) - 1 for length in range(WORD_BYTES + 1)], np.uint64)
# Of the first word, by the piece's length. Of a piece that is too long for two words nothing is
# taken: 0 is the key that is never found.
_FIRST_MASKS = np.array([*_WORD_MASKS, *_WORD_MASKS[-1:].repeat(WORD_BYTES), 0], np.uint64)


def words_of(text: bytes) -> np.ndarray:
    """The word that starts at each byte of a text but the last 7: a view, not aligned."""
    return np.ndarray((len(text) - WORD_BYTES + 1,), "<u8", text, strides=(1,))


def first_words(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first words of pieces' keys, 0 for those of more than two words.

    Args:
        words: See words_of.
        starts: Where the pieces start, shape (n,).
        lengths: How long they are.

    Returns:
        Shape (n,), uint64.
    """
    first = words[starts]
    first &= np.take(_FIRST_MASKS, lengths, mode="clip")
    return first


def keys_of(
    words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_words: int
) -> list[np.ndarray]:
    """The keys of pieces.

    Args:
        words: See words_of; they reach num_words words behind every start.
        starts: Where the pieces start, shape (n,).
        lengths: How long they are, at most num_words.
        num_words: Words of a key.

    Returns:
        num_words arrays of shape (n,), uint64.
    """
    return [word_of(words, starts, lengths, number) for number in range(num_words)]


def word_of(words: np.ndarray, starts: np.ndarray, lengths: np.ndarray, number: int) -> np.ndarray:
    """One word of the keys that keys_of returns."""
    first = WORD_BYTES * number
    word = words[starts + first]
    word &= np.take(_WORD_MASKS, lengths - first, mode="clip")
    return word


class ShortTable:
    """Values of pieces of up to 16 bytes.

    A place is a word: what of the key's hash its number does not say, and a code. The hash of a
    key's first word is the word times an odd number, which loses nothing, so the place says exactly
    which word is there; the second one, if there is any, shifts the hash and is kept beside it.
    The code of a piece of up to 8 bytes is its value where that is small, as single tokens are.

    Args:
        slots_log2: Logarithm of the number of places, each of 24 bytes.
    """

    def __init__(self, slots_log2: int) -> None:
        self._shift = np.uint64(64 - slots_log2)
        self._code_bits = np.uint64(slots_log2 - _PLACES_LOG2)
        self._other = np.uint64((1 << int(self._code_bits)) - 2)  # the code says nothing
        self._entries = np.empty(1 << slots_log2, np.uint64)
        self._details = np.empty((1 << slots_log2, 2), np.uint64)  # second words and values
        self._turn = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries[:] = _NO_KEY
        self._details[:] = 0

    @property
    def values(self) -> np.ndarray:
        """Every value, a view of shape (slots,); 0 where a place is empty."""
        return self._details[:, 1]

    def find(
        self, first: np.ndarray, long: np.ndarray, second: np.ndarray, codes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Look keys up.

        Args:
            first: Their first words, shape (n,), uint64; 0 is never found.
            long: Indices of those that have a second word, rising, shape (m,).
            second: Their second words, shape (m,), uint64.
            codes: To be filled with small values of the others, shape (n,), of any type that they
                fit.

        Returns:
            Indices of all keys whose values are not in codes, rising, and their values; MISSING if
            they are not there.
        """
        hashed = first * _MULTIPLIERS[0]
        hashed[long] += second * _MULTIPLIERS[1]
        slots = (hashed >> self._shift).view(np.int64)
        hashed <<= self._code_bits
        entries = np.take(self._entries, slots, mode="clip")
        entries ^= hashed  # what is left of the right one is its code
        np.copyto(codes, entries, casting="unsafe")
        elsewhere = entries >= self._other
        elsewhere[long] = True
        at = np.flatnonzero(elsewhere)

        entries, slots = np.take(entries, at, mode="clip"), np.take(slots, at, mode="clip")
        seconds = np.zeros(len(first), np.uint64)
        seconds[long] = second
        seconds = np.take(seconds, at, mode="clip")
        details = np.take(self._details, slots, axis=0, mode="clip")
        right = entries == self._other
        right &= details[:, 0] == seconds
        values = np.where(right, details[:, 1], MISSING)
        rest = np.flatnonzero(~right)
        hashed = hashed[at[rest]]
        self._find_behind(entries[rest] ^ hashed, hashed, seconds[rest], slots[rest], rest, values)
        return at, values

    def _find_behind(
        self,
        entries: np.ndarray,
        hashed: np.ndarray,
        seconds: np.ndarray,
        slots: np.ndarray,
        at: np.ndarray,
        values: np.ndarray,
    ) -> None:
        """Look for keys in the places behind their first; at says where their values go."""
        entries[hashed == 0] = _NO_KEY
        for place in range(1, _PLACES):
            # Places are taken in this order and never left: behind an empty one there is nothing.
            going = np.flatnonzero(entries != _NO_KEY)
            if not going.size:
                return
            hashed, seconds, slots, at = hashed[going], seconds[going], slots[going], at[going]
            entries = np.take(self._entries, slots ^ place, mode="clip")
            code = entries ^ hashed
            right = (code < self._other) & (seconds == 0)
            details = np.take(self._details, slots ^ place, axis=0, mode="clip")
            right |= (code == self._other) & (details[:, 0] == seconds)
            found = np.flatnonzero(right)
            values[at[found]] = details[found, 1]
            entries[found] = _NO_KEY

    def insert(self, keys: list[np.ndarray], values: np.ndarray) -> None:
        """Add keys that are not in the table, by both words, the second 0 where there is none; a
        few may be lost to others that came with them."""
        first, second = keys
        hashed = first * _MULTIPLIERS[0] + second * _MULTIPLIERS[1]
        home = (hashed >> self._shift).view(np.int64)
        codes = np.where(second == 0, np.minimum(values, self._other), self._other)
        entries = (hashed << self._code_bits) | codes
        for _ in range(_INSERT_ROUNDS):
            slots = home.copy()
            taken = np.flatnonzero(self._entries[slots] != _NO_KEY)
            for place in range(1, _PLACES):
                slots[taken] = home[taken] ^ place
                taken = taken[self._entries[slots[taken]] != _NO_KEY]
            self._turn += 1
            slots[taken] ^= (taken + self._turn) % _PLACES
            self._entries[slots] = entries
            self._details[slots] = np.stack([second, values], axis=1)
            lost = np.flatnonzero(self._entries[slots] != entries)  # two keys went to one place
            if not lost.size:
                return
            home, entries, second, values = home[lost], entries[lost], second[lost], values[lost]


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
