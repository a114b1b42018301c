"""Pieces that the cache does not know: encoded many at once, and learned.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

Only the distinct ones are encoded: those of up to 16 bytes all together by their merges (merges),
few and long ones by tiktoken.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.merges import Merges
from pipeline.piece_cache import KEY_WORDS, MAX_PIECE_BYTES, PieceCache
from pipeline.piece_table import MISSING, WORD_BYTES, keys_of, words_of

if TYPE_CHECKING:
    import tiktoken

_SEPARATOR = 0
_PLACES_PER_KEY = 8  # when distinct ones are looked for
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_FEW_PIECES = 1000  # of which tiktoken encodes each faster than Merges all together

Tokens = tuple[np.ndarray, np.ndarray]  # ids of pieces joined, and how many each has


class _Group(NamedTuple):
    """Distinct pieces, the longest first: their keys, and how long they are."""

    keys: list[np.ndarray]
    lengths: np.ndarray


class UnknownPieces:
    """Encodes pieces that are missing in a cache.

    Args:
        encoding: Whose ids they get.
        cache: Which learns them.
    """

    def __init__(self, encoding: tiktoken.Encoding, cache: PieceCache) -> None:
        self._encoding, self._cache = encoding, cache
        self._pieces = _piece_encoding(encoding)
        self._separator = encoding._mergeable_ranks[bytes([_SEPARATOR])]
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
        values = [self._one_by_one(raw, starts[:begin], lengths[:begin])]
        groups, places = [], []
        for num_words in reversed(KEY_WORDS):
            shorter = num_words // 2 * WORD_BYTES
            end = int(np.count_nonzero(lengths_as_keys > shorter))
            keys = keys_of(words, starts[begin:end], lengths[begin:end], num_words)
            distinct, which = _distinct(keys)
            groups.append(_Group([key[distinct] for key in keys], lengths[begin:end][distinct]))
            places.append(which)
            begin = end
        for group, which, tokens in zip(groups, places, self._tokens(*groups), strict=True):
            values.append(self._cache.learn(group.keys, *tokens)[which])
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

    def _tokens(self, wide: _Group, two: _Group, one: _Group) -> Iterator[Tokens]:
        """Tokens of pieces whose keys have 4 words, 2 words, and one."""
        yield self._joined(wide)
        lengths = np.concatenate([two.lengths, one.lengths])
        if self.merges is None or len(lengths) < _FEW_PIECES:
            yield self._joined(two)
            yield self._joined(one)
            return
        first = np.concatenate([two.keys[0], one.keys[0]])
        ids, counts = self.merges.encode([first, two.keys[1]], lengths)
        num_two = len(two.lengths)
        num_ids = counts[:num_two].sum()
        yield ids[:num_ids], counts[:num_two]
        yield ids[num_ids:], counts[num_two:]

    def _joined(self, group: _Group) -> Tokens:
        """By tiktoken, in one call."""
        pieces = np.stack(group.keys, axis=1).view(np.uint8)
        joined = np.zeros((len(pieces), pieces.shape[1] + 1), np.uint8)
        joined[:, :-1] = pieces
        keep = joined != _SEPARATOR
        keep[:, -1] = True  # a separator
        ids = self._pieces.encode_to_numpy(joined[keep].tobytes().decode(), disallowed_special=())
        separators = np.flatnonzero(ids == self._separator)
        return np.delete(ids, separators), np.diff(separators, prepend=-1) - 1

    def _one_by_one(self, raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Values of pieces that have no keys."""
        bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        ids = [self._encoding._encode_single_piece(raw[begin:end]) for begin, end in bounds]
        counts = np.fromiter(map(len, ids), np.int64, len(ids))
        joined = np.fromiter(itertools.chain.from_iterable(ids), np.uint32, counts.sum())
        return self._cache.learn(None, joined, counts)


def _lengths_as_keys(raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How long pieces are, uint8: MAX_PIECE_BYTES + 1 for all that cannot be in keys."""
    sizes = np.minimum(lengths, MAX_PIECE_BYTES + 1).astype(np.uint8)
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
    hashed = functools.reduce(lambda mixed, key: (mixed ^ key) * _MULTIPLIER, keys, np.uint64(0))
    bits = int(_PLACES_PER_KEY * len(rows) + 1).bit_length()
    slots = (hashed >> np.uint64(64 - bits)).view(np.int64)
    owners = np.empty(1 << bits, np.int64)
    owners[slots] = rows
    first = np.take(owners, slots, mode="clip")
    for key in keys:
        first = np.where(np.take(key, first, mode="clip") == key, first, rows)
    distinct = np.flatnonzero(first == rows)
    owners[: len(rows)][distinct] = np.arange(len(distinct))
    which = np.take(owners, first, mode="clip")
    return distinct, which


def _piece_encoding(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The same ranks with a pattern that splits at zero bytes only: many pieces in one call."""
    import tiktoken

    return tiktoken.Encoding(
        f"{encoding.name}-pieces",
        pat_str=r"[^\x00]+|\x00",
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={},
    )
