"""Pieces that a text is likely to hold though no token of the vocabulary is one of them.

Runs in: tokenizers. Pure: no I/O, no clock, no process.

Most words that are new to a tokenizer are a word of its vocabulary in another form: it knows
" apple" and " Apple", the text says "Apples". Of what is new in 3 MB of web text, after another
3 MB, these are a fifth; the forms left out (-ed, -ly, un- …) bring less than they cost.
"""

from __future__ import annotations

from collections.abc import Iterable

_NUMBERS = 10_000


def likely_pieces(tokens: Iterable[bytes]) -> list[bytes]:
    """The tokens themselves, and other forms of the words among them.

    Args:
        tokens: Of a vocabulary; a word is what begins with a space and has ASCII letters only.

    Returns:
        Distinct pieces: tokens as they are; words small and capitalized, with a space before them
        and without one; their plurals; numbers of up to four digits.
    """
    tokens = list(tokens)
    bare = [token[1:] for token in tokens if token[:1] == b" " and token[1:].isalpha()]
    forms = [*bare, *(word.capitalize() for word in bare), *(word.lower() for word in bare)]
    forms += [b"%d" % number for number in range(_NUMBERS)]
    plurals = [b" " + word + b"s" for word in bare if len(word) > 2 and word[-1:] != b"s"]
    return list(dict.fromkeys([*tokens, *forms, *(b" " + form for form in forms), *plurals]))
