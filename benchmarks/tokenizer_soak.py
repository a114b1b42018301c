"""The encoder on an endless stream of new pieces: does it stay as fast and as small as it was?

    python -m benchmarks.tokenizer_soak [--gigabytes G] [--new SHARE] [--json FILE]

English from this Python's own library, in which a share of the words is written over by letters
and digits that were never there before. Prints speed and memory ten times.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks import corpus
from pipeline import encoding

_BLOCK_BYTES = 4 << 20
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)


def template(share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A block of text, and the positions of the bytes of its words that will be written over."""
    text = "\n".join(corpus.source_documents(None)).encode()[:_BLOCK_BYTES]
    text = (text * (_BLOCK_BYTES // len(text) + 1))[:_BLOCK_BYTES].decode(errors="ignore").encode()
    words = [match.span() for match in re.finditer(rb"\b[a-z]{7,16}\b", text)]
    pieces = len(re.findall(rb"\w+|\W", text))
    count = min(len(words), int(share * pieces))
    chosen = [words[index] for index in rng.choice(len(words), count, replace=False)]
    positions = np.concatenate([np.arange(begin, end) for begin, end in chosen])
    return np.frombuffer(bytearray(text), np.uint8), positions


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--new", type=float, default=0.02, help="share of the words that are new")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    text, positions = template(arguments.new, rng)
    encoder = encoding.load("gpt2", None)
    process = psutil.Process()
    rows = []
    done = size = tokens = 0
    cpu = 0.0
    while done < arguments.gigabytes * 1e9:
        # a letter first, so that it stays one word
        text[positions] = _LETTERS[rng.integers(0, len(_LETTERS), len(positions), np.uint8)]
        begin = time.process_time()
        tokens += len(encoder.encode_block(text, np.array([0, len(text)]), False))
        cpu += time.process_time() - begin
        done += len(text)
        size += len(text)
        if done >= arguments.gigabytes * 1e8 * (len(rows) + 1):
            rss, speed = process.memory_info().rss / 2**20, size / cpu / 1e6
            rows.append({"gigabytes": done / 1e9, "mb_per_s": speed, "rss_mib": rss})
            print(f"{done / 1e9:5.1f} GB: {speed:6.1f} MB/s, {rss:6.1f} MiB", flush=True)
            size, cpu = 0, 0.0
    slowdown = rows[-1]["mb_per_s"] / rows[0]["mb_per_s"]
    print(f"{tokens:,} tokens; the last tenth ran at {slowdown:.2f} of the first one's speed")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
