"""Random texts that hit the corners of a tokenizer's pattern."""

from __future__ import annotations

import random

FRAGMENTS = [
    *["'", "'s", "'S", "'ll", "'LL", "'Ll", "'ve", "'re", "'t", "'d", "'m", "'l", "'v", "'r", "''"],
    *[" ", "  ", "   ", "\n", "\n\n", " \n", "\r\n", "\r", "\t", " \n\n  ", "  '", "\v", "\f"],
    *["\u00a0", "\u2003", "\u3000", "\u2028", "\u0085", "\u1680", "\u200b", "\u180e", "\ufeff"],
    *["a", "b", "A", "ABC", "aB", "Ab", "Hello", "don", "world", "x" * 20, "ab" * 40],
    *["1", "12", "123", "1234", "12345678901", "٣", "٠١٢", "Ⅷ", "½", "²", "१२३४"],
    *["’", "“", "–", "...", "!", "?!", "_", "-", "--", "/", "//", "http://", "#", "€", "™"],
    *["é", "e\u0301", "\u0301", "ß", "ſ", "'ſ", "İ", "ʰ", "ª", "ǅ", "ñ", "Ω", "Привет", "שלום"],
    *["中文", "日本語", "中" * 15, "한국어", "ไทย", "हिन्दी", "𝔘", "👍", "👨\u200d👩\u200d👧", "🇩🇪"],
    *["\0", "\x01", "\x1c", "\x7f", "<|endoftext|>", "<|fim_prefix|>", "\U0010ffff", "\ud7ff"],
]
_DENSE = " '\n\tabsSLl1.,\r"
_RANGES = ((0, 0x80), (0, 0x800), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000))


def random_text(rng: random.Random) -> str:
    """A text of 0 to 80 fragments, of characters of one kind, or of any in Unicode."""
    length = rng.choice((0, 1, 2, 3, 5, 8, 20, 80))
    kind = rng.random()
    if kind < 0.5:
        return "".join(rng.choices(FRAGMENTS, k=length))
    if kind < 0.75:
        return "".join(rng.choices(_DENSE, k=length))
    if kind < 0.9:
        return "".join(chr(rng.randrange(*rng.choice(_RANGES))) for _ in range(length))
    first, last = rng.choice(_RANGES)
    return "".join(chr(rng.randrange(first, last)) for _ in range(length))
