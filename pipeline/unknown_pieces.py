"""Pieces that the cache does not know: encoded many at once, and learned.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

Only the distinct ones are encoded: those of up to 16 bytes all together by their merges (merges),
few and long ones by tiktoken.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.merges import Merges
from pipeline.piece_cache import KEY_WORDS, MAX_PIECE_BYTES, PieceCache
from pipeline.piece_table import MISSING, WORD_BYTES, keys_of, words_of

if TYPE_CHECKING:
    import tiktoken

_PLACES_PER_KEY = 8  # when distinct ones are looked for
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FEW_PIECES = 1000  # of which tiktoken encodes each faster than Merges all together

Tokens = tuple[np.ndarray, np.ndarray]  # ids of pieces joined, and how many each has


class _Group(NamedTuple):
    """Distinct pieces, the longest first: their keys, and where they are."""

    keys: list[np.ndarray]
    starts: np.ndarray
    lengths: np.ndarray


class UnknownPieces:
    """Encodes pieces that are missing in a cache.

    Args:
        encoding: Whose ids they get.
        cache: Which learns them.
    """

    def __init__(self, encoding: tiktoken.Encoding, cache: PieceCache) -> None:
        self._encoding, self._cache = encoding, cache
        try:
            self.merges: Merges | None = Merges(encoding._mergeable_ranks)
        except ValueError:
            self.merges = None

    def encode(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Encode and learn.

        Args:
            raw: UTF-8.
            starts: Where its pieces start, shape (n,).
            lengths: How long they are.

        Returns:
            Their values in the cache, shape (n,), uint64; see PieceCache.learn.
        """
        words = words_of(raw + bytes(MAX_PIECE_BYTES))
        lengths_as_keys = _lengths_as_keys(raw, starts, lengths)
        order = np.argsort(~lengths_as_keys, kind="stable")  # the longest first, as Merges wants it
        starts, lengths, lengths_as_keys = starts[order], lengths[order], lengths_as_keys[order]
        begin = int(np.count_nonzero(lengths_as_keys > MAX_PIECE_BYTES))
        tokens = self._one_by_one(raw, starts[:begin], lengths[:begin])
        values = [self._cache.learn(None, *tokens)]
        for low, num_words in ((KEY_WORDS[0] * WORD_BYTES, KEY_WORDS[1]), (0, KEY_WORDS[0])):
            end = int(np.count_nonzero(lengths_as_keys > low))
            here = slice(begin, end)
            keys = keys_of(words, starts[here], lengths[here], num_words)
            distinct, which = _distinct(keys)
            keys = [key[distinct] for key in keys]
            group = _Group(keys, starts[here][distinct], lengths[here][distinct])
            values.append(self._cache.learn(keys, *self._tokens(group, raw))[which])
            begin = end
        unsorted = np.empty(len(order), np.uint64)
        unsorted[order] = np.concatenate(values)
        return unsorted

    def learn(self, pieces: list[bytes]) -> None:
        """Let the cache know distinct pieces before they come."""
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        starts = np.cumsum(lengths) - lengths
        raw = b"".join(pieces)
        text, ids = raw + bytes(WORD_BYTES), np.empty(len(pieces), np.uint32)
        at, found = self._cache.find(text, starts, lengths, ids)
        new = at[found == MISSING]
        self.encode(raw, starts[new], lengths[new])

    def _tokens(self, group: _Group, raw: bytes) -> Tokens:
        """Tokens of all pieces of one kind of key."""
        first, second, *more = group.keys
        if more or self.merges is None or len(first) < _FEW_PIECES:
            return self._one_by_one(raw, group.starts, group.lengths)
        num_long = np.count_nonzero(second)
        return self.merges.encode([first, second[:num_long]], group.lengths)

    def _one_by_one(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> Tokens:
        """By tiktoken."""
        bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        ids = [self._encoding._encode_single_piece(raw[begin:end]) for begin, end in bounds]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.uint32, counts.sum()), counts


def _lengths_as_keys(raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How long pieces are, uint8: MAX_PIECE_BYTES + 1 for all that cannot be in keys."""
    sizes: np.ndarray = np.minimum(lengths, MAX_PIECE_BYTES + 1).astype(np.uint8)
    if raw.find(0) >= 0:
        zeros = np.flatnonzero(np.frombuffer(raw, np.uint8) == 0)
        any_zero = np.diff(np.searchsorted(zeros, [starts, starts + lengths]), axis=0)[0] > 0
        sizes[any_zero] = MAX_PIECE_BYTES + 1
    return sizes


def _distinct(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of distinct keys, rising, and for each key, which of them it is.

    A key whose place in the hash table went to another may come more than once.
    """
    rows = np.arange(len(keys[0]))
    hashed = np.zeros(len(rows), np.uint64)
    for key in keys:
        hashed = (hashed ^ key) * _MULTIPLIER
    bits = int(_PLACES_PER_KEY * len(rows) + 1).bit_length()
    slots = (hashed >> np.uint64(64 - bits)).view(np.int64)
    owners = np.empty(1 << bits, np.int64)
    owners[slots] = rows
    first: np.ndarray = np.take(owners, slots, mode="clip")
    for key in keys:
        first = np.where(np.take(key, first, mode="clip") == key, first, rows)
    distinct = np.flatnonzero(first == rows)
    owners[: len(rows)][distinct] = np.arange(len(distinct))
    which: np.ndarray = np.take(owners, first, mode="clip")
    return distinct, which
