"""A tiktoken encoding, or the first ranks of one, as Hugging Face's tokenizer.json.

Runs in: the command line's own process, for `export`. Pure.

tiktoken stores ranks only; Hugging Face's byte-level BPE wants the merges. The merge that makes a
token is what is left of its bytes when only lower ranks may be merged: two parts.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import tiktoken

# Oniguruma, which Hugging Face's tokenizers use, reads `{n,m}+` and `$` in Ruby's way: not
# possessive, and the end of any line. None of tiktoken's patterns needs to be possessive.
_POSSESSIVE = re.compile(r"(?<!\\)([+*?}])\+")


def tokenizer_json(encoding: tiktoken.Encoding, vocab_size: int, eot: int) -> dict[str, Any]:
    """The whole tokenizer.json.

    Args:
        encoding: With its whole vocabulary.
        vocab_size: V; ranks below eot are kept if it is smaller than the encoding's own.
        eot: Id of the end-of-text token, which stands before every text.
    """
    cut = vocab_size != encoding.n_vocab
    ranks = {t: r for t, r in encoding._mergeable_ranks.items() if not cut or r < eot}
    special = {"<|endoftext|>": eot} if cut else dict(encoding._special_tokens)
    name = next(text for text, number in special.items() if number == eot)
    shown = _byte_characters()

    def spell(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merges = [
        [spell(part) for part in parts]
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": oniguruma(encoding._pat_str)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": _preceded_by(name, eot),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as in tiktoken: a piece that is a token is that token
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def oniguruma(pattern: str) -> str:
    """A pattern of tiktoken in the syntax of Hugging Face's tokenizers."""
    return _POSSESSIVE.sub(r"\1", pattern).replace("$", r"\z")


def _preceded_by(name: str, eot: int) -> dict[str, Any]:
    """The end-of-text token before every text, as in training."""
    token = {"SpecialToken": {"id": name, "type_id": 0}}

    def text(which: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": which, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [token, text("A", 0)],
        "pair": [token, text("A", 0), token, text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [eot], "tokens": [name]}},
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _parts(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """The token's bytes after all merges of a rank below limit, lowest first."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        if pairs[at] >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
