"""Where a text falls into the pieces of GPT-2's pattern, for many documents at once.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

Whether a piece starts at a byte depends on the bytes around it only, so it is boolean algebra on
whole arrays instead of a walk. In words:

- a run of letters, numbers or other characters is a piece; a plain space before it belongs to it;
- a run of white space is a piece, and its last character another one if anything follows;
- at the start of a piece, an apostrophe and one of s d m t ll ve re are a piece.
"""

from __future__ import annotations

import numpy as np

from pipeline import codepoints

# Of gpt2, r50k_base, p50k_base and p50k_edit.
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

PAD_BYTES = 8  # zero bytes behind the text that a splitter may read

# The code of a byte. The low half says to which characters after it this one joins, the high half
# what it is: two neighbours are of one piece if the left one's low half and the right one's high
# half have a bit in common. A plain space joins to anything.
_LETTER, _NUMBER, _OTHER, _WHITE, _SPACE = 0x11, 0x22, 0x44, 0x88, 0x8F
_WHITE_BIT = 0x80

APOSTROPHE = ord("'")


class Gpt2Splitter:
    """Splits by GPT2_PATTERN.

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
        self._ascii = self._codes[:128].tobytes() + bytes(128)

    def starts(self, text: bytes, bounds: np.ndarray) -> np.ndarray:
        """Where the pieces start.

        Args:
            text: Valid UTF-8, then PAD_BYTES zero bytes.
            bounds: Where the documents start, and the end of the last; rising, shape (k + 1,).

        Returns:
            Positions in bytes, rising, shape (n_pieces,), int64.
        """
        size = len(text) - PAD_BYTES
        raw = np.frombuffer(text, np.uint8)
        codes = np.frombuffer(bytearray(text.translate(self._ascii)), np.uint8)
        is_special = raw >= 0xC0
        is_special |= raw == APOSTROPHE
        special = np.flatnonzero(is_special)
        wide = raw[special] >= 0xC0
        wide_spaces = paint(codes, raw, special[wide], self._codes)
        codes[size:] = _WHITE  # white space at the end of the text is not split

        start = apart(codes)
        ends = bounds[1:][bounds[1:] > 0] - 1
        at_ends = start[ends]
        start[:-1] |= codes[:-1] > (codes[1:] | (_WHITE_BIT - 1))  # the last of white space
        # every document is a text of its own
        start[size:] = False
        start[ends] = at_ends
        move_to_first(start, wide_spaces)
        start[bounds[:-1]] = True
        _split_contractions(start, raw, special[~wide], bounds)
        return np.flatnonzero(start[:size])


def code_table(classes: np.ndarray, code_of: dict[int, int], other: int) -> np.ndarray:
    """The code of every code point: code_of its class, or other."""
    of_class = np.full(int(classes.max()) + 1, other, np.uint8)
    for bits, code in code_of.items():
        for bit in (1 << n for n in range(8)):
            if bits & bit and bit < len(of_class):
                of_class[bit] = code
    return of_class[classes]


def apart(codes: np.ndarray) -> np.ndarray:
    """Whether each byte is of another piece than the one before it, by their codes alone."""
    joined = codes >> 4
    joined[1:] &= codes[:-1]
    return joined == 0


def move_to_first(start: np.ndarray, wide_spaces: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Where a piece starts at the last byte of a wide space, let it start at the first."""
    for first, last in wide_spaces:
        start[first] |= start[last]
        start[last] = False


def paint(
    codes: np.ndarray, raw: np.ndarray, leads: np.ndarray, of_code_point: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give every byte of the wide characters, which start at leads, the code of the code point.

    Returns:
        First and last bytes of white space of 2 and of 3 bytes: pairs of arrays.
    """
    lead = raw[leads]
    spaces: list[tuple[np.ndarray, np.ndarray]] = []
    for at, length in (
        (leads[lead < 0xE0], 2),
        (leads[(lead >= 0xE0) & (lead < 0xF0)], 3),
        (leads[lead >= 0xF0], 4),
    ):
        if not at.size:
            continue
        code_point = raw[at].astype(np.int32) & (0x7F >> length)
        for byte in range(1, length):
            code_point <<= 6
            code_point |= raw[at + byte] & 0x3F
        code = of_code_point[code_point]
        for byte in range(length):
            codes[at + byte] = code
        white = at[code >= _WHITE_BIT]
        if white.size:
            spaces.append((white, white + (length - 1)))
    return spaces


def _split_contractions(
    start: np.ndarray, raw: np.ndarray, apostrophes: np.ndarray, bounds: np.ndarray
) -> None:
    """An apostrophe where a piece starts, and s d m t ll ve or re behind it, are a piece."""
    at = apostrophes[start[apostrophes]]
    if not at.size:
        return
    edge = np.zeros(len(raw), bool)
    edge[bounds] = True
    inside = ~edge[at + 1]
    one, two = raw[at + 1], raw[at + 2]
    short = at[_SHORT[one] & inside]
    long = at[(_LONG[one] == two) & inside & ~edge[at + 2]]
    start[short + 1] = False
    start[short + 2] = True
    start[long + 1] = False
    start[long + 3] = True


_SHORT = np.zeros(256, bool)
_SHORT[list(b"sdmt")] = True
_LONG = np.full(256, 0xFF, np.uint8)  # by the first letter, the second
_LONG[list(b"lvr")] = list(b"lee")
