"""The encoder against tiktoken's encode_to_numpy, on one core.

    python -m benchmarks.tokenizer --docs FOLDER [--rounds R] [--json FILE]

Contestants alternate on the same documents; medians over the rounds, in CPU time of this process.
tiktoken gets Python strings that are there already; ours gets the bytes of a block, checks that
they are UTF-8 and puts an end of text before each document. What its cache has seen is said:

- cold: nothing but the vocabulary. Making the tables is a line of its own.
- other: other documents only. Every round warms it on one half of the documents and measures the
  other half; every round halves them differently. A run over gigabytes knows more than this.
- same: this very text, once before.

How many pieces are unknown falls with what has been seen; the last line of each encoding says how.

cl100k_base and o200k_base need their files: set TIKTOKEN_CACHE_DIR to a folder that holds them,
as tiktoken keeps them (the PyPI package litellm carries both, in litellm_core_utils/tokenizers).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from benchmarks import corpus
from pipeline import columnar, encoding
from pipeline.errors import ConfigError
from pipeline.piece_table import MISSING

ENCODINGS = (("gpt2", None), ("gpt2", 32000), ("cl100k_base", None), ("o200k_base", None))
_BLOCK_BYTES = 4 << 20  # what a tokenizer gets at a time

Block = tuple[np.ndarray, np.ndarray]


def blocks(documents: list[str]) -> list[Block]:
    """The documents as a tokenizer gets them."""
    out: list[Block] = []
    some: list[bytes] = []
    for number, document in enumerate(documents):
        some.append(document.encode())
        if sum(map(len, some)) >= _BLOCK_BYTES or number == len(documents) - 1:
            offsets = np.cumsum([0, *map(len, some)])
            out.append((np.frombuffer(b"".join(some), np.uint8), offsets))
            some = []
    return out


def load(name: str, vocab_size: int | None) -> columnar.ColumnarEncoder:
    """A new encoder; its pattern is known."""
    encoder = encoding.load(name, vocab_size)
    assert isinstance(encoder, columnar.ColumnarEncoder)
    return encoder


def timed_tiktoken(plain: tiktoken.Encoding, documents: list[str]) -> tuple[float, int]:
    """CPU seconds and tokens of one call per document."""
    begin = time.process_time()
    tokens = sum(
        len(plain.encode_to_numpy(document, disallowed_special=())) for document in documents
    )
    return time.process_time() - begin, tokens


def timed(encoder: encoding.Encoder, text: list[Block], documents: int) -> tuple[float, int]:
    """CPU seconds and tokens of all blocks; ends of text are not counted."""
    begin = time.process_time()
    tokens = sum(len(encoder.encode_block(*block, False)) for block in text)
    return time.process_time() - begin, tokens - documents


def compare(
    name: str, vocab_size: int | None, documents: list[str], rounds: int
) -> dict[str, float]:
    """All states of one encoding: MB/s of each, and its ratio to tiktoken's."""
    seconds: dict[str, list[float]] = defaultdict(list)
    sizes = []
    for number in range(rounds):
        shuffled = random.Random(number).sample(documents, len(documents))
        half = len(shuffled) // 2
        seen, measured = blocks(shuffled[:half]), shuffled[half:]
        text = blocks(measured)
        sizes.append(sum(len(block[0]) for block in text))

        cold, warm = load(name, vocab_size), load(name, vocab_size)
        plain = encoding.TiktokenEncoder(cold._encoding, cold.eot, cold.vocab_size)
        begin = time.process_time()
        cold.prepare()
        seconds["tables"].append(time.process_time() - begin)
        warm.prepare()
        timed(warm, seen, 0)
        results = {
            "tiktoken": timed_tiktoken(plain._encoding, measured),
            "cold": timed(cold, text, len(measured)),
            "other": timed(warm, text, len(measured)),
            "same": timed(warm, text, len(measured)),
        }
        assert len({tokens for _, tokens in results.values()}) == 1, results
        for block in text:
            ids = warm.encode_block(*block, False)
            assert np.array_equal(ids, plain.encode_block(*block, False)), "the ids differ"
        for state, (took, _) in results.items():
            seconds[state].append(took)
    figures = {"tables_s": statistics.median(seconds.pop("tables"))}
    for state, took in seconds.items():
        pairs = list(zip(sizes, took, seconds["tiktoken"], strict=True))
        figures[f"{state}_mb_per_s"] = statistics.median(size / one / 1e6 for size, one, _ in pairs)
        figures[f"{state}_ratio"] = statistics.median(other / one for _, one, other in pairs)
    return figures


def unknown(name: str, vocab_size: int | None, documents: list[str]) -> dict[float, float]:
    """Megabytes seen, and which share of the pieces of other documents is unknown then."""
    shuffled = random.Random(0).sample(documents, len(documents))
    other = blocks(shuffled[len(shuffled) // 2 :])
    shares = {}
    for part in (8, 4, 2):
        encoder = load(name, vocab_size)
        seen = blocks(shuffled[: len(shuffled) // part])
        timed(encoder, seen, 0)
        counts = np.zeros(2, np.int64)
        find = encoder._cache.find

        def counted(*arguments: Any, find: Any = find, counts: np.ndarray = counts) -> Any:
            at, values = find(*arguments)
            counts += np.count_nonzero(values == MISSING), len(arguments[1])
            return at, values

        encoder._cache.find = counted  # type: ignore[method-assign]
        timed(encoder, other[:1], 0)
        missing, pieces = counts.tolist()
        shares[sum(len(block[0]) for block in seen) / 1e6] = missing / pieces
    return shares


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="parquet files with a column `text`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, help="more text, by reshuffling paragraphs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    documents = corpus.source_documents(arguments.docs)
    if arguments.megabytes:
        documents = list(corpus.documents(documents, arguments.megabytes << 20, seed=1))
    size = sum(len(document.encode()) for document in documents)
    kind = "reshuffled" if arguments.megabytes else "real"
    print(
        f"{len(documents)} {kind} documents, {size / 1e6:.1f} MB, {arguments.rounds} rounds; "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(
            f"{package} {metadata.version(package)}" for package in ("tiktoken", "numpy", "pyarrow")
        )
    )
    everything = {}
    for name, vocab_size in ENCODINGS:
        label = name if vocab_size is None else f"{name}/{vocab_size}"
        try:
            known = isinstance(encoding.load(name, vocab_size), columnar.ColumnarEncoder)
        except ConfigError as error:
            print(f"{label:12} left out: {error}")
            continue
        if not known:
            print(f"{label:12} goes through tiktoken: its pattern has no splitter")
            continue
        figures = everything[label] = compare(name, vocab_size, documents, arguments.rounds)
        states = [
            f"tables {figures['tables_s']:.2f} s",
            f"tiktoken {figures['tiktoken_mb_per_s']:.1f} MB/s",
        ]
        for state in ("cold", "other", "same"):
            speed, ratio = figures[f"{state}_mb_per_s"], figures[f"{state}_ratio"]
            states.append(f"{state} {speed:.1f} MB/s, {ratio:.2f} x")
        print(f"{label:12} {' | '.join(states)}")
        shares = unknown(name, vocab_size, documents)
        seen = ", ".join(f"{100 * part:.2f} % after {size:.1f} MB" for size, part in shares.items())
        print(f"{'':12} unknown pieces: {seen}")
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
