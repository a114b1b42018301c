"""The columnar encoder against tiktoken: the ids never differ."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from pipeline import (
    codepoints,
    columnar,
    encoding,
    merges,
    piece_cache,
    piece_table,
    pieces,
    pieces_cl100k,
    ragged,
    unknown_pieces,
)
from tests.fragments import FRAGMENTS, random_text
from tests.harness import english

Pair = tuple[columnar.ColumnarEncoder, encoding.TiktokenEncoder]


def pair(vocab_size: int | None, pattern: str = pieces.GPT2_PATTERN) -> Pair:
    """A new encoder with nothing in its cache, and the reference for its ids."""
    encoder = encoding.load("gpt2", vocab_size)
    assert isinstance(encoder, columnar.ColumnarEncoder)
    plain = tiktoken.Encoding(
        "test",
        pat_str=pattern,
        mergeable_ranks=encoder._encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": encoder.eot},
    )
    encoder = encoding._encoder("gpt2", plain, encoder.eot, encoder.vocab_size)
    assert isinstance(encoder, columnar.ColumnarEncoder)
    return encoder, encoding.TiktokenEncoder(plain, encoder.eot, encoder.vocab_size)


# The smallest vocabulary makes nearly every piece several tokens. cl100k's own needs a download;
# what matters here is its pattern.
PAIRS = {
    "gpt2": pair(None),
    "gpt2/32000": pair(32000),
    "gpt2/300": pair(300),
    "cl100k pattern": pair(None, pieces_cl100k.CL100K_PATTERN),
    "cl100k pattern/300": pair(300, pieces_cl100k.CL100K_PATTERN),
}
GPT2 = PAIRS["gpt2"]


def block(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    raw = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, raw)]).astype(np.int64)
    return np.frombuffer(b"".join(raw), np.uint8), offsets


def check(texts: list[str], continues: bool = False, encoders: Pair = GPT2) -> None:
    encoder, reference = encoders
    ids = encoder.encode_block(*block(texts), continues)
    expected = reference.encode_block(*block(texts), continues)
    assert ids.dtype == expected.dtype
    assert ids.tobytes() == expected.tobytes()


PIECEWISE = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=30)
TEXT = st.one_of(st.text(max_size=80), PIECEWISE.map("".join))


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXT, max_size=6), st.booleans(), st.sampled_from(sorted(PAIRS)))
def test_the_ids_are_those_of_tiktoken(texts: list[str], continues: bool, name: str) -> None:
    check(texts, continues, PAIRS[name])


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", "", ""],
        ["", "a", "", "b", ""],
        ["'", "s", "'", "ll", "'l", "l", "don'", "t", "a", "'s", " ", "'s"],
        ["'s's'S'LL'll'llama'tis ''s '''t", "'ves", "'re're", "\n't", "\u00a0's", "1's", "'1"],
        ["a  b", "a \n b", "a\n\n b", "\n", " ", "   ", "a ", "a  ", "a \t", "\r\n\r\n x", "\t1"],
        [
            "a\u00a0b",
            "a\u00a0 b",
            "a \u00a0b",
            "a\u00a0",
            "\u3000\u3000x",
            "x\u2028\u2029y",
            "\x85",
        ],
        ["\u00a0", "\u00a0", "\u3000", " ", "\u2003\u2003"],
        ["e\u0301 \u0301", "\u0301", "a\u200db", "\U0001f469\u200d\U0001f467", "\u202eabc"],
        [
            "12345 ٣٤ Ⅷ ½ ¹²",
            "a1b2",
            "1'2",
            "x٣y",
            "1234567",
            "12",
            "٣٤٣٤٣٤٣",
            "1٣23 4567",
            "12",
            "34",
        ],
        [
            "!\n\n  a",
            "!\n \n a",
            "!\r\n",
            "!",
            "\n",
            "(a",
            " (a",
            "((a",
            "“a",
            " “a",
            "\ta",
            "!\na",
        ],
        [
            "\n  a",
            "\n \n  ",
            "\n\t",
            " \n",
            "a",
            "\n ",
            "  \n  1",
            "\r\r a",
            "'ſ",
            "'ſa",
            "('s",
            "a'Sb",
        ],
        ["<|endoftext|>", "a<|endoftext|>b", "<|fim_prefix|>"],
        ["\0", "a\0", "a\0b", "\0\0\0", " \0", "a\0" * 40, "a", "a\0\0", "ab", "ab\0"],
        ["\x1c\x1d\x1e\x1f", "\x0b\x0c", "\x7f", "\ufeffa"],
        ["ßſŉǅʰªº", "İı", "Ａｂ", "中文字符", "한국어", "ไทย", "हिन्दी", "עברית"],
        [letter * length for length in range(6, 36) for letter in "a中-"],
    ],
)
def test_corners(texts: list[str]) -> None:
    for encoders in PAIRS.values():
        check(texts, encoders=encoders)
        check(texts, continues=True, encoders=encoders)
        check(["".join(texts)], encoders=encoders)


@pytest.mark.parametrize("name", ["gpt2", "cl100k pattern"])
def test_a_long_text_of_one_piece(name: str) -> None:
    texts = ["x" * 1_000_000, "\n" * 99_999 + "a", "!" * 100_000, "7" * 50_000, " " * 70_000, "a b"]
    check(texts, encoders=PAIRS[name])


@pytest.mark.parametrize("name", ["gpt2", "cl100k pattern"])
def test_every_code_point_is_classified_as_tiktoken_does(name: str) -> None:
    """Each one beside letters, numbers, spaces and others."""
    code_points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for first in range(0, len(code_points), 200_000):
        some = code_points[first : first + 200_000]
        texts = ["".join(f"a{c} 1{c}.{c}" for c in some[n::20]) for n in range(20)]
        check(texts, encoders=PAIRS[name])


def test_many_random_texts_in_one_block() -> None:
    """Enough unknown pieces at once to be encoded by their merges."""
    rng = random.Random(1)
    for encoder, reference in PAIRS.values():
        new = encoding._encoder("gpt2", encoder._encoding, encoder.eot, encoder.vocab_size)
        assert isinstance(new, columnar.ColumnarEncoder)
        texts = [random_text(rng) for _ in range(2000)]
        words = ["".join(rng.choices("abcdeéнтaio", k=rng.randrange(1, 20))) for _ in range(5000)]
        check([*texts, " ".join(words)], encoders=(new, reference))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(PAIRS)))
def test_a_block_is_cut_anywhere_inside_a_step(seed: int, name: str) -> None:
    """Steps of a few bytes: at documents' edges, in documents, over what cannot be cut."""
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(rng.randrange(8))]
    texts.insert(0, " ".join(english(2))[: rng.randrange(400)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "_CHUNK_BYTES", rng.choice((16, 32, 100)))
        check(texts, continues=rng.random() < 0.5, encoders=PAIRS[name])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(PAIRS)))
def test_a_document_goes_on_in_the_next_block(seed: int, name: str) -> None:
    """The ids of two blocks, cut where safe_cut says, are those of the whole document."""
    rng = random.Random(seed)
    text = " ".join(english(3))[: rng.randrange(2000)] + random_text(rng) + " and so on."
    raw = text.encode()
    at = encoding.safe_cut("gpt2")(raw, rng.randrange(len(raw)))
    encoder, reference = PAIRS[name]
    parts = [raw[:at], raw[at:]] if at else [raw]
    ids = [
        encoder.encode_block(np.frombuffer(part, np.uint8), np.array([0, len(part)]), number > 0)
        for number, part in enumerate(parts)
    ]
    assert np.concatenate(ids).tolist() == reference.encode_block(*block([text]), False).tolist()


@settings(max_examples=300)
@given(st.lists(st.one_of(st.binary(max_size=6), TEXT.map(str.encode)), max_size=4))
def test_bytes_that_are_not_utf8_are_refused(documents: list[bytes]) -> None:
    encoder, reference = GPT2
    text = np.frombuffer(b"".join(documents), np.uint8)
    offsets = np.cumsum([0, *map(len, documents)])
    try:
        expected = reference.encode_block(text, offsets, False)
    except UnicodeDecodeError as refused:
        with pytest.raises(UnicodeDecodeError) as error:
            encoder.encode_block(text, offsets, False)
        assert str(error.value) == str(refused)
    else:
        assert encoder.encode_block(text, offsets, False).tolist() == expected.tolist()


def test_a_character_cut_by_a_documents_edge_is_refused() -> None:
    raw = "é".encode()
    with pytest.raises(UnicodeDecodeError):
        GPT2[0].encode_block(np.frombuffer(raw, np.uint8), np.array([0, 1, 2]), False)


def test_offsets_need_not_start_at_the_texts_first_byte() -> None:
    encoder, reference = GPT2
    text, offsets = block(["skipped", "one two", "three"])
    ids = encoder.encode_block(text, offsets[1:], False)
    assert ids.tolist() == reference.encode_block(text, offsets[1:], False).tolist()


def test_the_cache_is_bounded_and_forgets_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """New pieces for ever, through tables that hold a few hundred."""
    monkeypatch.setattr(piece_cache, "_SLOTS_LOG2", (8, 4))
    monkeypatch.setattr(piece_cache, "_MAX_LOAD", 4)
    monkeypatch.setattr(piece_cache, "_STORED_TOKENS", 3000)
    monkeypatch.setattr(unknown_pieces, "_FEW_PIECES", 100)
    encoders = pair(300)
    encoders[0].prepare()
    cache = encoders[0]._cache
    rng = random.Random(2)
    compacted = 0
    for _ in range(60):
        before = cache._used
        words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 33))) for _ in range(150)]
        check([" ".join(words[first::3]) for first in range(3)], encoders=encoders)
        compacted += cache._used < before
        assert cache._used < 3000 + 150 * 32  # the limit and one block
        assert [len(table.values) for table in cache._tables] == [256, 16]
    assert compacted > 5
    assert sum(int((table.values >= piece_cache.TWO).sum()) for table in cache._tables) > 50


def test_a_text_is_known_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, _ = pair(300)
    words = [word for word in " ".join(english(20)).split() if len(word) < 30]
    text, offsets = block([" ".join(words)])
    first = encoder.encode_block(text, offsets, False)
    monkeypatch.setattr(encoder._unknown, "encode", None)
    assert encoder.encode_block(text, offsets, False).tolist() == first.tolist()


def test_a_full_store_that_is_all_in_use_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_cache, "_STORED_TOKENS", 500)
    encoders = pair(32000)
    cache = encoders[0]._cache
    rng = random.Random(3)
    for _ in range(5):
        check([" ".join(str(rng.random()) for _ in range(300))], encoders=encoders)
        assert cache._used > 500
        cache.make_room()
        assert cache._used == 0
        assert all((table.values < piece_cache.TWO).all() for table in cache._tables)


def pieces_up_to(size: int) -> st.SearchStrategy[list[bytes]]:
    """Distinct ones without zero bytes, as keys want them."""
    piece = st.binary(min_size=1, max_size=size).filter(lambda piece: 0 not in piece)
    return st.lists(piece, max_size=200, unique=True)


@settings(max_examples=100, deadline=None)
@given(pieces_up_to(32), st.integers(4, 10))
def test_a_table_finds_what_it_holds_and_nothing_else(found: list[bytes], slots_log2: int) -> None:
    """Every value that comes back is the right one, whatever was thrown out."""
    table = piece_table.PieceTable(4, slots_log2)
    keys = list(ragged.padded(found, 32).view("<u8").T)
    half = len(found) // 2
    table.insert([key[:half] for key in keys], np.arange(half, dtype=np.uint64) + 7)
    check_found(table.find(keys), half, table.values)


@settings(max_examples=200, deadline=None)
@given(pieces_up_to(16), st.integers(4, 10), st.integers(0, 1000))
def test_a_table_of_short_pieces_does_so_too(
    found: list[bytes], slots_log2: int, step: int
) -> None:
    """Whether the values are codes or not: with few places, few are."""
    table = piece_table.ShortTable(slots_log2)
    first, second = ragged.padded(found, 16).view("<u8").T
    half = len(found) // 2
    given_values = np.arange(half, dtype=np.uint64) * step + 7
    table.insert([first[:half], second[:half]], given_values)
    codes = np.empty(len(found), np.uint64)
    long = np.flatnonzero(second)
    at, others = table.find(first, long, second[long], codes)
    values = codes
    values[at] = others
    held = values[:half] != piece_table.MISSING
    assert (values[:half][held] == given_values[held]).all()
    values[:half][held] = np.flatnonzero(held) + 7
    check_found(values, half, table.values)


def check_found(values: np.ndarray, half: int, held_values: np.ndarray) -> None:
    """The first half of the keys was inserted, the values counted from 7."""
    assert (values[half:] == piece_table.MISSING).all()
    held = values[:half] != piece_table.MISSING
    assert (values[:half][held] == np.flatnonzero(held) + 7).all()
    assert held.sum() == (held_values != 0).sum()
    if half <= 4:
        assert held.all()


def test_keys_that_agree_in_all_but_one_word_are_told_apart() -> None:
    """One of two words has the hash of a key of one word: only its second word tells."""
    first, second = piece_table._MULTIPLIERS[:2]
    inverse = np.uint64(pow(int(first), -1, 1 << 64))
    words = np.array([0x61, 0x62, 0x61, 0x61], np.uint64)
    seconds = np.array([0, 0, 0x63, 0x64], np.uint64)
    words = np.append(words, words[:1] - np.array([0x65], np.uint64) * second * inverse)
    seconds = np.append(seconds, np.uint64(0x65))
    table = piece_table.ShortTable(10)
    for known in range(len(words)):
        table.clear()
        here = slice(known, known + 1)
        table.insert([words[here], seconds[here]], np.array([3], np.uint64))
        codes = np.full(len(words), 99, np.uint64)
        long = np.flatnonzero(seconds)
        at, others = table.find(words, long, seconds[long], codes)
        codes[at] = others
        expected = np.full(len(words), piece_table.MISSING)
        expected[known] = 3
        assert codes.tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [None, 32000, 300])
def test_likely_pieces_are_known_before_they_come(
    vocab_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other forms of the vocabulary's words; of a smaller one those of the whole."""
    encoder = encoding.load("gpt2", vocab_size)
    assert isinstance(encoder, columnar.ColumnarEncoder)
    reference = encoding.TiktokenEncoder(encoder._encoding, encoder.eot, encoder.vocab_size)
    encoder.prepare()
    monkeypatch.setattr(encoder._unknown, "encode", None)
    text, offsets = block(["apple Apple apples Apples 1789 9999", "Zimbabwe zimbabwe", "Guitars"])
    ids = encoder.encode_block(text, offsets, False)
    assert ids.tolist() == reference.encode_block(text, offsets, False).tolist()


MERGES = {
    name: merges.Merges(PAIRS[name][0]._encoding._mergeable_ranks) for name in ("gpt2", "gpt2/300")
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.binary(min_size=1, max_size=16), TEXT.map(str.encode)), min_size=1),
    st.sampled_from(sorted(MERGES)),
)
def test_merges_are_those_of_tiktoken(raw: list[bytes], name: str) -> None:
    """Of any bytes; "banana" merges the leftmost of equal pairs."""
    cut = [piece[:16].replace(b"\0", b"a") for piece in [*raw, b" bananana"]]
    some = sorted((piece for piece in cut if piece), key=len, reverse=True)
    words = list(ragged.padded(some, 16).view("<u8").T)
    ids, counts = MERGES[name].encode(words, np.array(list(map(len, some))))
    expected = [PAIRS[name][0]._encoding._encode_single_piece(piece) for piece in some]
    assert counts.tolist() == list(map(len, expected))
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))


def test_the_table_of_merges_is_exact() -> None:
    """Every pair of tokens that is a token, and pairs that are none."""
    encoder = PAIRS["gpt2/32000"][0]._encoding
    ranks = {token: rank for token, rank in encoder._mergeable_ranks.items() if len(token) <= 16}
    left, right, merged = merges._pairs(ranks)
    expected = {
        (ranks[token[:cut]], ranks[token[cut:]]): rank
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    }
    assert (
        dict(zip(zip(left.tolist(), right.tolist(), strict=True), merged.tolist(), strict=True))
        == expected
    )
    table = merges.PairTable(left, right, merged)
    assert (table.find(left, right) >> 5 == merged).all()
    rng = np.random.default_rng(0)
    others = rng.integers(0, 32000, (2, 200_000), np.uint32)
    found = table.find(*others)
    for one, two, merge in zip(*others.tolist(), found.tolist(), strict=True):
        assert merge == (expected[one, two] << 5 if (one, two) in expected else merges.NO_MERGE)


def test_a_vocabulary_that_merges_cannot_reach_is_left_to_tiktoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ "abc" is a token, but neither "ab" nor "bc" is."""
    monkeypatch.setattr(unknown_pieces, "_FEW_PIECES", 1)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    odd = tiktoken.Encoding(
        "odd",
        pat_str=GPT2[0]._encoding._pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 257},
    )
    with pytest.raises(ValueError, match="1 tokens"):
        merges.Merges(ranks)
    encoder = encoding._encoder("gpt2", odd, 257, 258)
    assert isinstance(encoder, columnar.ColumnarEncoder)
    encoders = (encoder, encoding.TiktokenEncoder(odd, 257, 258))
    check(["abc abcd", "abc"], encoders=encoders)
    for table in encoder._cache._tables:
        table.clear()  # not even known as a token now
    check(["abc abcd", "abc"], encoders=encoders)


def test_the_patterns_are_those_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """If tiktoken changes one, its encoding goes through tiktoken until the splitter follows."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    for name in ("gpt2", "r50k_base", "p50k_base", "p50k_edit"):
        assert getattr(openai_public, name)()["pat_str"] == pieces.GPT2_PATTERN
    assert openai_public.cl100k_base()["pat_str"] == pieces_cl100k.CL100K_PATTERN


def test_a_pattern_that_is_not_known_exactly_goes_through_tiktoken() -> None:
    gpt2 = GPT2[0]._encoding
    other = tiktoken.Encoding(
        "gpt2",  # the name says nothing
        pat_str=gpt2._pat_str.replace(r"\p{N}++", r"\p{N}{1,3}+"),
        mergeable_ranks=gpt2._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    encoder = encoding._encoder("gpt2", other, 50256, 50257)
    assert isinstance(encoder, encoding.TiktokenEncoder)


def test_the_classes_of_code_points_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    ask = codepoints.ask_tiktoken
    monkeypatch.setattr(codepoints, "ask_tiktoken", lambda: (asked.append(1), ask())[1])
    table = codepoints.classes()
    assert (codepoints.classes() == table).all()
    assert len(asked) == 1
    assert table[ord("a")] == codepoints.LOWER
    assert table[0x3000] == codepoints.SPACE
    (kept,) = (tmp_path / "fineweb-pipeline").iterdir()  # and no partial file
    data = bytearray(kept.read_bytes())
    data[100] ^= 1
    kept.write_bytes(data)
    assert (codepoints.classes() == table).all()  # damaged: asked again, and written again
    assert (codepoints.classes() == table).all()
    assert len(asked) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert (codepoints.classes() == table).all()
