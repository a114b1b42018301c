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

MAX_BYTES = 16  # of a piece
_BATCH = 1 << 14  # pieces

# A merge is a number of 32 bits: the merged token's id, and the row of the left one (_ROW_BITS), so
# that the least of some merges is the one to make first.
_ROW_BITS = np.uint64(5)
_ROW = np.uint32((1 << 5) - 1)
NO_MERGE = np.uint32(0xFFFF_FFFF)
_BIT = np.uint32(1)
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
        first, second = np.divmod(np.arange(1 << 16), 256)
        self._byte_pairs = self._pairs.find(self._bytes[first], self._bytes[second])
        # tiktoken takes a piece that is a token as it is. Here it has to come out of the merges.
        tokens = [token for token in short if 0 not in token]
        _, counts = self.encode(ragged.padded(tokens, MAX_BYTES))
        if odd := np.count_nonzero(counts != 1):
            raise ValueError(f"{odd} tokens are not what their merges give")

    def encode(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of pieces by the merges alone.

        Args:
            pieces: Their bytes, filled up with zeros, shape (n, width ≤ MAX_BYTES), uint8; none is
                empty or contains zeros.

        Returns:
            Their ids joined, uint32, and each piece's number of tokens, shape (n,), int64.
        """
        ids, counts = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for first in range(0, len(pieces), _BATCH):
            some = self._encode_batch(pieces[first : first + _BATCH].T.copy())
            ids.append(some[0])
            counts.append(some[1])
        return np.concatenate(ids), np.concatenate(counts)

    def _encode_batch(self, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Column k holds piece k: byte j of it, later the token that starts there, in row j + 1.
        # Rows 0 and length + 1 hold what merges with nothing.
        width, num = letters.shape
        tokens = np.full((width + 2, num), self._none, np.uint32)
        np.take(self._bytes, letters, out=tokens[1:-1], mode="clip")
        merges = np.full((width + 2, num), NO_MERGE, np.uint32)  # of each token and the next one
        pairs = letters[:-1].astype(np.int64) << 8
        pairs |= letters[1:]
        np.take(self._byte_pairs, pairs, out=merges[1:width], mode="clip")
        merges[1:width] |= np.arange(1, width, dtype=np.uint32)[:, None]
        inside = letters != 0
        heads = self._merge(tokens, merges, inside.sum(axis=0, dtype=np.uint32))
        alive = (heads[:, None] >> np.arange(1, width + 1, dtype=np.uint32)) & 1 != 0
        alive &= inside.T
        return tokens[1:-1].T[alive], alive.sum(axis=1)

    def _merge(self, tokens: np.ndarray, merges: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Merge until nothing merges, in place.

        Returns:
            For each piece a number whose bits are the rows at which tokens start, shape (n,).
        """
        num = tokens.shape[1]
        # Rows at which tokens start, the ones that merge with nothing too: as bits from the lowest
        # and from the highest one on, to find the next row and the previous one.
        up = (np.uint32(1) << (lengths + 2)) - np.uint32(1)
        down = ~np.uint32(0) << (30 - lengths)
        flat_tokens, flat_merges = tokens.reshape(-1), merges.reshape(-1)
        while True:
            least = merges.min(axis=0)
            piece = np.flatnonzero(least != NO_MERGE)
            if not piece.size:
                return up
            least = least[piece]
            merged = least >> np.uint32(5)
            left = least & _ROW
            rising = up[piece]
            right = left + _trailing_zeros(rising >> (left + 1))
            rising ^= _BIT << right
            up[piece] = rising
            falling = down[piece]
            falling ^= _BIT << (31 - right)
            down[piece] = falling
            beyond = left + _trailing_zeros(rising >> (left + 1))
            previous = left - _trailing_zeros(falling >> (32 - left))
            at, at_previous = _flat(left, num, piece), _flat(previous, num, piece)
            flat_tokens[at] = merged
            flat_merges[_flat(right, num, piece)] = NO_MERGE
            new = self._pairs.find(merged, flat_tokens[_flat(beyond, num, piece)])
            flat_merges[at] = new | left
            new = self._pairs.find(flat_tokens[at_previous], merged)
            flat_merges[at_previous] = new | previous


def _trailing_zeros(bits: np.ndarray) -> np.ndarray:
    """The number of the lowest bit that is set, from 1 on."""
    return np.bitwise_count(bits ^ (bits - 1))


def _flat(rows: np.ndarray, num: int, columns: np.ndarray) -> np.ndarray:
    return rows.astype(np.int64) * num + columns


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
