"""Where a text falls into the pieces of cl100k_base's pattern, for many documents at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

As in pieces, but more depends on what stands farther away:

- letters take one character before them that is no letter, number or newline: any white space, or
  another character at the start of a piece;
- numbers are cut after every third character;
- other characters take a plain space before them and all newlines behind them;
- white space is a piece up to its last newline, a piece without its last character, and that one;
- contractions are those of pieces, in both cases.
"""

from __future__ import annotations

import numpy as np

from pipeline import codepoints
from pipeline.pieces import APOSTROPHE, PAD_BYTES, apart, code_table, move_to_first, paint

CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)

# Codes as in pieces: white space joins to letters, a plain space to other characters too.
_LETTER, _NUMBER, _OTHER, _NEWLINE, _WHITE, _SPACE = 0x11, 0x22, 0x44, 0x88, 0x89, 0x8D
_WHITE_BIT = 0x80
_DIGITS = 3


class Cl100kSplitter:
    """Splits by CL100K_PATTERN.

    Args:
        classes: Class of every code point; see codepoints.classes.
    """

    def __init__(self, classes: np.ndarray) -> None:
        code_of = {
            codepoints.LETTER: _LETTER,
            codepoints.NUMBER: _NUMBER,
            codepoints.SPACE: _WHITE,
        }
        self._codes = code_table(classes, code_of, _OTHER)
        self._codes[ord(" ")] = _SPACE
        self._codes[[ord("\n"), ord("\r")]] = _NEWLINE
        self._ascii = self._codes[:128].tobytes() + bytes(128)

    def starts(self, text: bytes, bounds: np.ndarray) -> np.ndarray:
        """See pieces.Gpt2Splitter.starts."""
        size = len(text) - PAD_BYTES
        raw = np.frombuffer(text, np.uint8)
        codes = np.frombuffer(bytearray(text.translate(self._ascii)), np.uint8)
        wide_spaces = paint(codes, raw, np.flatnonzero(raw >= 0xC0), self._codes)
        codes[size:] = _NEWLINE  # white space at the end of the text is not split
        edge = np.zeros(len(raw), bool)
        edge[bounds] = True

        start = apart(codes)
        ends = bounds[1:][bounds[1:] > 0] - 1
        at_ends = start[ends]
        white = codes >= _WHITE_BIT
        last_white = white[:-1] & ~white[1:]
        start[:-1] |= last_white & (codes[:-1] != _NEWLINE)
        start[size:] = False
        start[ends] = at_ends  # every document is a text of its own
        move_to_first(start, wide_spaces)
        start[bounds[:-1]] = True

        newlines = np.flatnonzero(codes[:size] == _NEWLINE)
        if newlines.size:
            _split_after_newlines(start, codes, newlines, last_white, bounds)
            _join_newlines(start, codes, newlines, edge)
        _join_letters(start, raw, codes, edge)
        _split_contractions(start, raw, edge)
        _split_numbers(start, raw, codes)
        return np.flatnonzero(start[:size])


def _split_after_newlines(
    start: np.ndarray,
    codes: np.ndarray,
    newlines: np.ndarray,
    last_white: np.ndarray,
    bounds: np.ndarray,
) -> None:
    """White space behind the last newline of its run is a piece of its own, but at the end."""
    size = int(bounds[-1])
    following = np.append(newlines[1:], size)
    before_white = (codes[newlines + 1] > _NEWLINE) & (newlines + 1 < size)
    newlines, following = newlines[before_white], following[before_white]
    if not newlines.size:
        return
    run_ends = np.append(np.flatnonzero(last_white), size)
    run_end = run_ends[np.searchsorted(run_ends, newlines)]
    document_end = bounds[np.searchsorted(bounds, newlines, side="right")]
    alone = (run_end < document_end - 1) & (following > run_end)
    start[newlines[alone] + 1] = True


def _join_newlines(
    start: np.ndarray, codes: np.ndarray, newlines: np.ndarray, edge: np.ndarray
) -> None:
    """Newlines right behind other characters belong to them."""
    first = np.diff(newlines, prepend=-2) > 1
    first |= edge[newlines]
    behind = codes[newlines - 1] == _OTHER
    behind &= ~edge[newlines]
    runs = np.cumsum(first) - 1
    joined = behind[first][runs]
    start[newlines[joined]] = False
    last = np.append(first[1:], True)
    start[newlines[joined & last] + 1] = True


def _join_letters(start: np.ndarray, raw: np.ndarray, codes: np.ndarray, edge: np.ndarray) -> None:
    """Letters take another character before them that starts a piece: it is a single one."""
    behind = codes[1:] == _LETTER
    behind &= codes[:-1] == _OTHER
    letters = np.flatnonzero(behind) + 1
    letters = letters[~edge[letters]]
    before = letters - 1
    for _ in range(3):  # to the first byte of a wide character
        before -= (raw[before] & 0xC0) == 0x80
    start[letters[start[before]]] = False


def _split_contractions(start: np.ndarray, raw: np.ndarray, edge: np.ndarray) -> None:
    """An apostrophe where a piece starts, and s d m t ll ve or re behind it, are a piece."""
    at = np.flatnonzero(raw == APOSTROPHE)
    at = at[start[at] & ~edge[at + 1]]
    one, two = raw[at + 1], raw[at + 2]
    whole = ~edge[at + 2]
    long_s = (one == 0xC5) & (two == 0xBF)  # U+017F is an s in another case
    for follow, length in (
        (_SHORT[one], 2),
        (_LONG[one] == (two | 0x20), 3),
        (long_s, 3),
    ):
        some = at[follow & whole] if length == 3 else at[follow]
        start[some + 1] = False
        start[some + length] = True


def _split_numbers(start: np.ndarray, raw: np.ndarray, codes: np.ndarray) -> None:
    """Numbers are cut after every third character."""
    numbers = np.flatnonzero(codes == _NUMBER)
    numbers = numbers[(raw[numbers] & 0xC0) != 0x80]
    index = np.arange(len(numbers))
    first = np.maximum.accumulate(np.where(start[numbers], index, 0))
    start[numbers[(index - first) % _DIGITS == 0]] = True


_SHORT = np.zeros(256, bool)
_SHORT[list(b"sdmtSDMT")] = True
_LONG = np.zeros(256, np.uint8)  # by the first letter, the second in lower case
_LONG[list(b"lvrLVR")] = list(b"leelee")
