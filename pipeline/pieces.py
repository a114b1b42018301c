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

_APOSTROPHE = ord("'")


class Gpt2Splitter:
    """Splits by GPT2_PATTERN.

    Args:
        classes: Class of every code point; see codepoints.classes.
    """

    def __init__(self, classes: np.ndarray) -> None:
        of_class = np.full(classes.max() + 1, _OTHER, np.uint8)
        for bit in (codepoints.UPPER, codepoints.LOWER, codepoints.OTHER_LETTER):
            of_class[bit] = _LETTER
        of_class[codepoints.NUMBER] = _NUMBER
        of_class[codepoints.SPACE] = _WHITE
        self._codes = of_class[classes]
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
        special = raw >= 0xC0
        special |= raw == _APOSTROPHE
        special = np.flatnonzero(special)
        wide = raw[special] >= 0xC0
        wide_spaces = _paint(codes, raw, special[wide], self._codes)
        codes[size:] = _WHITE  # white space at the end of the text is not split

        apart = codes >> 4
        apart[1:] &= codes[:-1]
        apart = apart == 0  # from the character before
        ends = bounds[1:][bounds[1:] > 0] - 1
        apart_at_ends = apart[ends]
        start = apart
        start[:-1] |= codes[:-1] > (codes[1:] | (_WHITE_BIT - 1))  # the last of white space
        # every document is a text of its own
        start[size:] = False
        start[ends] = apart_at_ends
        for first, last in wide_spaces:
            start[first] |= start[last]
            start[last] = False
        start[bounds[:-1]] = True
        _split_contractions(start, raw, special[~wide], bounds)
        return np.flatnonzero(start[:size])


def _paint(
    codes: np.ndarray, raw: np.ndarray, leads: np.ndarray, of_code_point: np.ndarray
) -> list[np.ndarray]:
    """Give every byte of the wide characters, which start at leads, the code of the code point.

    Returns:
        First and last bytes of white space of 2 and of 3 bytes: pairs of arrays.
    """
    lead = raw[leads]
    spaces = []
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

SPLITTERS = {GPT2_PATTERN: Gpt2Splitter}
