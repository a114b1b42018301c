"""Which code points are letters, numbers, marks and white space to tiktoken's regex engine.

Runs in: supervisor, tokenizers and trainer, once each, while the encoder is loaded.

Python's unicodedata follows another version of Unicode and differs in thousands of code points, so
the engine itself is asked: an encoding of the 256 bytes whose pattern is `\\p{L}` returns exactly
the letters of a text. Asking it about every code point takes half a second, so the answer is kept
in the user's cache folder, under tiktoken's version.
"""

from __future__ import annotations

import importlib.metadata

import numpy as np
import xxhash

from pipeline import user_cache

# One bit per class; a code point has at most one of them, and none if it is anything else.
UPPER, LOWER, OTHER_LETTER, MARK, NUMBER, SPACE = (1 << bit for bit in range(6))
LETTER = UPPER | LOWER | OTHER_LETTER

_CLASSES = {
    UPPER: r"[\p{Lu}\p{Lt}]",
    LOWER: r"\p{Ll}",
    OTHER_LETTER: r"[\p{Lm}\p{Lo}]",
    MARK: r"\p{M}",
    NUMBER: r"\p{N}",
    SPACE: r"\s",
}
_NUM_CODE_POINTS = 0x110000
_SURROGATES = range(0xD800, 0xE000)


def classes() -> np.ndarray:
    """The class of every code point, from the cache folder or from tiktoken.

    Returns:
        Shape (0x110000,), uint8: one of the bits above, or 0.
    """
    path = user_cache.folder() / f"codepoints-tiktoken-{importlib.metadata.version('tiktoken')}.bin"
    try:
        return unpack(path.read_bytes())
    except (OSError, ValueError):  # not there, not readable, or damaged: ask again
        table = ask_tiktoken()
    user_cache.keep(path, pack(table))
    return table


def ask_tiktoken() -> np.ndarray:
    """The class of every code point, as classes() returns it, from the regex engine."""
    code_points = np.arange(_NUM_CODE_POINTS, dtype="<u4")
    text = np.delete(code_points, _SURROGATES).tobytes().decode("utf-32-le")
    # One pass over all of Unicode; the single classes are then sought among its matches only.
    some = _matches("|".join(_CLASSES.values()), text)
    table = np.zeros(_NUM_CODE_POINTS, np.uint8)
    for bit, pattern in _CLASSES.items():
        found = _matches(pattern, some)
        table[np.frombuffer(found.encode("utf-32-le"), "<u4")] |= bit
    return table


def _matches(pattern: str, text: str) -> str:
    """All characters of a text that a pattern for one character matches, joined."""
    import tiktoken

    single_bytes = {bytes([byte]): byte for byte in range(256)}
    engine = tiktoken.Encoding(
        "classes", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={}
    )
    ids = engine.encode_to_numpy(text, disallowed_special=())
    return ids.astype(np.uint8).tobytes().decode()


def pack(table: np.ndarray) -> bytes:
    """The table as runs of one class (first code point and class), behind their digest."""
    first = np.flatnonzero(np.diff(table, prepend=table[0] + 1))
    runs = np.stack([first, table[first]]).astype("<u4").tobytes()
    return xxhash.xxh3_64_digest(runs) + runs


def unpack(data: bytes) -> np.ndarray:
    """The inverse of pack. Raises: ValueError: the digest does not fit."""
    digest, runs = data[:8], data[8:]
    if not runs or digest != xxhash.xxh3_64_digest(runs):
        raise ValueError("damaged")
    first, bits = np.frombuffer(runs, "<u4").reshape(2, -1)
    lengths = np.diff(np.append(first.astype(np.int64), _NUM_CODE_POINTS))
    return np.repeat(bits.astype(np.uint8), lengths)
