"""The merges of a byte-pair encoding, applied to thousands of pieces at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

The algorithm is tiktoken's: of the neighbouring tokens of a piece whose bytes together are a
token, merge the pair of the lowest rank, the leftmost of equals; until there is none. Here every
step does it in all pieces of a batch. tiktoken takes a microsecond for a rare word.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import ragged
from pipeline.piece_table import WORD_BYTES

MAX_BYTES = 16  # of a piece
_BATCH = 1 << 14  # pieces

# A merge is a number of 32 bits: the merged token's id, and the row of the left one (_ROW_BITS), so
# that the least of some merges is the one to make first.
_ROW_BITS = np.uint64(5)
_ROW = np.uint32((1 << 5) - 1)
NO_MERGE = np.uint32(0xFFFF_FFFF)
_BIT = np.uint32(1)
_HIGHEST_BIT = np.log2(np.arange(1 << MAX_BYTES).clip(1)).astype(np.uint32)  # of a number
# Two tokens and a merge fill 62 bits of a table's entry.
_TOKEN_BITS = np.uint64(19)
MAX_TOKEN = 1 << 19
_MERGE_BITS = np.uint64(24)
_MERGE_MASK = np.uint64((1 << 24) - 1)
_EMPTY = np.uint64(0x7FFF_FFFF_FFFF_FFFF)
_MORE = np.uint64(0x8000_0000_0000_0000)
_NOTHING = np.uint64(NO_MERGE)
_MULTIPLIERS = np.array([0x9E3779B1, 0x85EBCA77], np.uint32)


class Merges:
    """Encodes short pieces.

    Args:
        ranks: Rank, which is the token id, of every token's bytes; all 256 bytes are there.

    Raises:
        ValueError: these ranks cannot be handled so; tiktoken has to encode every piece.
    """

    def __init__(self, ranks: dict[bytes, int]) -> None:
        short = {token: rank for token, rank in ranks.items() if len(token) <= MAX_BYTES}
        self._none = max(short.values()) + 1
        if self._none >= MAX_TOKEN:
            raise ValueError(f"token ids reach {self._none}, above {MAX_TOKEN}")
        self._pairs = PairTable(*_pairs(short))
        # By byte and by two bytes; a zero byte is what pieces are filled up with.
        self._bytes = np.array([ranks[bytes([byte])] for byte in range(256)], np.uint32)
        self._bytes[0] = self._none
        second, first = np.divmod(np.arange(1 << 16), 256)
        self._byte_pairs = self._pairs.find(self._bytes[first], self._bytes[second])
        self._keep_met(short)

    def _keep_met(self, ranks: dict[bytes, int]) -> None:
        """Keep only the pairs that are ever met: of every token the last one that its merges join.
        Tokens never part, so a piece that holds a token's bytes has come to them as the token
        alone does. Of gpt2 it is one pair in three, and a table that is half as large."""
        tokens = sorted((token for token in ranks if 0 not in token), key=len, reverse=True)
        words = ragged.padded(tokens, MAX_BYTES).view("<u8")
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        met = np.full((2, self._none), self._none, np.uint32)
        _, counts = self.encode(list(words.T), lengths, met)
        # tiktoken takes a piece that is a token as it is. Here it has to come out of the merges.
        if odd := np.count_nonzero(counts != 1):
            raise ValueError(f"{odd} tokens are not what their merges give")
        merged = np.flatnonzero(met[0] != self._none)
        self._pairs = PairTable(met[0, merged], met[1, merged], merged.astype(np.uint32))

    def encode(
        self, words: list[np.ndarray], lengths: np.ndarray, met: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of pieces by the merges alone.

        Args:
            words: Their bytes, 8 to a word, filled up with zeros: arrays of uint64, the first of
                shape (n,); the second holds those of the pieces that are longer than 8, or more.
            lengths: How long they are, shape (n,), falling, at most MAX_BYTES; none is empty or
                contains zeros.
            met: To be filled with what was merged to each token, shape (2, tokens).

        Returns:
            Their ids joined, uint32, and each piece's number of tokens, shape (n,), int64.
        """
        ids, counts = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for first in range(0, len(lengths), _BATCH):
            here = slice(first, first + _BATCH)
            tokens, merges = self._begin([word[here] for word in words], lengths[here])
            heads = self._merge(tokens, merges, lengths[here].astype(np.uint32), met)
            some = _collect(tokens, heads)
            ids.append(some[0])
            counts.append(some[1])
        return np.concatenate(ids), np.concatenate(counts)

    def _begin(self, words: list[np.ndarray], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Column k holds piece k: byte j of it, later the token that starts there, in row j + 1.
        # Rows 0 and length + 1 hold what merges with nothing.
        num, width = len(lengths), int(lengths[0])
        tokens = np.full((width + 2, num), self._none, np.uint32)
        merges = np.full((width + 2, num), NO_MERGE, np.uint32)  # of each token and the next one
        longer = np.searchsorted(-lengths, -np.arange(width))  # pieces of more than j bytes
        for j, count in enumerate(longer):
            word, byte = divmod(j, WORD_BYTES)
            two = words[word][:count] >> np.uint64(8 * byte)
            if byte == WORD_BYTES - 1 and word + 1 < len(words):
                following = words[word + 1][:count]
                two[: len(following)] |= following << np.uint64(8)
            two &= np.uint64(0xFFFF)
            pairs = merges[j + 1, :count]
            np.take(self._byte_pairs, two.view(np.int64), out=pairs, mode="clip")
            pairs |= np.uint32(j + 1)
            two &= np.uint64(0xFF)
            np.take(self._bytes, two.view(np.int64), out=tokens[j + 1, :count], mode="clip")
        return tokens, merges

    def _merge(
        self, tokens: np.ndarray, merges: np.ndarray, lengths: np.ndarray, met: np.ndarray | None
    ) -> np.ndarray:
        """Merge until nothing merges, in place.

        Returns:
            For each piece a number whose bits are the rows at which tokens start, and of the two
            that merge with nothing; shape (n,).
        """
        num = tokens.shape[1]
        flat_tokens, flat_merges = tokens.reshape(-1), merges.reshape(-1)
        heads = (_BIT << (lengths + np.uint32(2))) - _BIT
        piece, starts, least = np.arange(num), heads.copy(), merges.min(axis=0)
        while True:
            going = np.flatnonzero(least != NO_MERGE)
            if len(going) < len(piece):
                heads[piece] = starts
                if not going.size:
                    return heads
                piece, starts, least = (
                    np.take(some, going, mode="clip") for some in (piece, starts, least)
                )
            # Of the left and the right token, and of their neighbours.
            rows = np.empty((4, len(piece)), np.uint32)
            left, previous, right, beyond = rows
            np.bitwise_and(least, _ROW, out=left)
            bit = _BIT << left
            behind = starts & -(bit << _BIT)
            lowest = behind & -behind
            starts ^= lowest  # the right token starts no more
            behind ^= lowest
            behind &= -behind
            right[:] = np.bitwise_count(lowest - _BIT)
            beyond[:] = np.bitwise_count(behind - _BIT)
            np.take(_HIGHEST_BIT, starts & (bit - _BIT), out=previous, mode="clip")
            at = rows.astype(np.int64)
            at *= num
            at += piece

            merged = least >> np.uint32(_ROW_BITS)
            if met is not None:
                met[:, merged] = flat_tokens[at[::2]]
            flat_tokens[at[0]] = merged
            flat_merges[at[2]] = NO_MERGE
            lefts, rights = np.empty((2, 2, len(piece)), np.uint32)
            lefts[0] = rights[1] = merged
            np.take(flat_tokens, at[3], out=rights[0], mode="clip")
            np.take(flat_tokens, at[1], out=lefts[1], mode="clip")
            new = self._pairs.find(lefts.reshape(-1), rights.reshape(-1)).reshape(2, -1)
            new |= rows[:2]
            flat_merges[at[:2]] = new
            least = np.take(merges[:, : piece[-1] + 1].min(axis=0), piece, mode="clip")


def _collect(tokens: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What Merges.encode returns, from the matrix of tokens and the rows at which they start."""
    num = len(heads)
    counts = np.bitwise_count(heads).astype(np.int64) - 2
    ends = np.cumsum(counts)
    ids = np.empty(ends[-1], np.uint32)
    flat, at, piece, rest = tokens.reshape(-1), ends - counts, np.arange(num), heads ^ _BIT
    while piece.size:
        row = np.bitwise_count((rest & -rest) - _BIT).astype(np.int64)
        ids[at] = np.take(flat, row * num + piece, mode="clip")
        rest &= rest - _BIT
        more = np.flatnonzero(rest & (rest - _BIT))  # the last one merges with nothing
        rest, at, piece = rest[more], at[more] + 1, piece[more]
    return ids, counts


class PairTable:
    """What two neighbouring tokens merge to, exactly.

    Args:
        left, right, merged: Token ids of all merges, below MAX_TOKEN, shape (n,).
    """

    def __init__(self, left: np.ndarray, right: np.ndarray, merged: np.ndarray) -> None:
        slots_log2 = max(8, int(8 * len(left)).bit_length())
        self._shift = np.uint32(32 - slots_log2)
        # An entry is the key, and below it the merge as find returns it.
        entries = self._key(left, right) | merged.astype(np.uint64) << _ROW_BITS
        slots = self._slots(left, right)
        self._table = np.full(1 << slots_log2, _EMPTY)
        self._table[slots] = entries
        # Pairs that lost their place are in a sorted array, and the place says so.
        lost = self._table[slots] != entries
        self._table[slots[lost]] |= _MORE
        self._lost = np.append(np.sort(entries[lost]), _EMPTY)

    def find(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The merges of pairs: the merged token's id << 5, or NO_MERGE; shape of left, uint32."""
        entries = np.take(self._table, self._slots(left, right), mode="clip")
        key = self._key(left, right)
        entries ^= key  # what is left of the right one is the merge
        elsewhere = np.flatnonzero(entries > _MORE + _MERGE_MASK)
        entries &= _EMPTY
        if elsewhere.size:
            key = key[elsewhere]
            entries[elsewhere] = self._lost[np.searchsorted(self._lost, key)] ^ key
        np.copyto(entries, _NOTHING, where=entries > _MERGE_MASK)
        return entries.astype(np.uint32)

    @staticmethod
    def _key(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        key = left.astype(np.uint64)
        key <<= _TOKEN_BITS
        key |= right
        key <<= _MERGE_BITS
        return key

    def _slots(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        hashed = left * _MULTIPLIERS[0]
        hashed += right * _MULTIPLIERS[1]
        hashed >>= self._shift
        return hashed.astype(np.int64)


def _pairs(ranks: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of tokens whose bytes together are a token: left, right and merged ids."""
    ids = np.fromiter(ranks.values(), np.uint32, len(ranks))
    lengths = np.fromiter(map(len, ranks), np.int64, len(ranks))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    text = np.frombuffer(b"".join(ranks), np.uint8)
    tokens = ragged.binary_array(text, bounds)
    # every way to cut every token in two
    cuts = lengths - 1
    left_lengths = ragged.positions(np.ones_like(cuts), cuts)
    starts, lengths = np.repeat(bounds[:-1], cuts), np.repeat(lengths, cuts)
    left = _index_in(tokens, text, starts, left_lengths)
    right = _index_in(tokens, text, starts + left_lengths, lengths - left_lengths)
    both = (left >= 0) & (right >= 0)
    return ids[left[both]], ids[right[both]], np.repeat(ids, cuts)[both]


def _index_in(
    tokens: pa.Array, text: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Which token each run of bytes is, or -1."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    runs = ragged.binary_array(text[ragged.positions(starts, lengths)], bounds)
    return np.asarray(pc.index_in(runs, value_set=tokens).fill_null(-1))
