"""A web server with any number of jsonl.zst shards that it makes when they are asked for.

    python -m benchmarks.endless [--docs FOLDER]     prints its port, serves until stdin closes

Process: one of its own. A .zst file may be a row of frames, so shard n is frames drawn by a
random generator of seed n from a pool that was compressed once, and one frame of new words
(hexadecimal numbers) that no other shard has. What repeats over a long run are the pool's
frames, about a megabyte of text each, not their order.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import zstandard

from benchmarks import corpus

FRAME_BYTES = 1_000_000  # of text
SHARD_FRAMES = 64
SHARD_BYTES = FRAME_BYTES * SHARD_FRAMES
_POOL_FRAMES = 192
_NEW_WORDS = 20_000  # of 16 digits, in a shard's own frame
_WORDS_A_DOCUMENT = 100


def name(number: int) -> str:
    """A shard's file name."""
    return f"shard-{number:06d}.jsonl.zst"


def _frame(texts: list[str]) -> bytes:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return zstandard.ZstdCompressor(level=3).compress(lines.encode())


def make_pool(docs: Path | None) -> list[bytes]:
    """Compressed frames of reshuffled text."""
    originals = corpus.source_documents(docs)
    return [
        _frame(list(corpus.documents(originals, FRAME_BYTES, seed + 1)))
        for seed in range(_POOL_FRAMES)
    ]


def _new_words(rng: random.Random) -> Iterator[str]:
    for _ in range(_NEW_WORDS // _WORDS_A_DOCUMENT):
        yield " ".join(f"{rng.getrandbits(64):016x}" for _ in range(_WORDS_A_DOCUMENT))


@functools.lru_cache(maxsize=32)
def shard(pool: tuple[bytes, ...], number: int) -> bytes:
    """The bytes of a shard, the same each time."""
    rng = random.Random(number)
    return b"".join([*rng.choices(pool, k=SHARD_FRAMES), _frame(list(_new_words(rng)))])


class Handler(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of shards, with ETag and open ranges."""

    protocol_version = "HTTP/1.1"
    pool: tuple[bytes, ...] = ()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        try:
            number = int(self.path.removeprefix("/shard-").removesuffix(".jsonl.zst"))
        except ValueError:
            self.send_error(404)
            return
        data, start = shard(self.pool, number), 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and wanted.endswith("-"):
            start = min(int(wanted[6:-1]), len(data))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{number}-{len(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.wfile.write(memoryview(data)[start:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    Handler.pool = tuple(make_pool(parser.parse_args().docs))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
