"""Small files that become, or claim to be, very large, and how much memory reading one takes.

python -m tests.bombs NAME        makes one, reads it, prints what came of it as JSON
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import ShardError
from tests.corpus.base import TAR_END, line, lz4, member
from tests.malformed import documents

PIECES = 16
_PIECE = b"a" * (32 << 20)
EXPANDED_BYTES = PIECES * len(_PIECE)


def _long_line(compress: Callable[[bytes], bytes], pieces: int) -> bytes:
    """Streams in a row: one line of pieces × 32 MiB, and a sound one behind it."""
    return compress(b'{"text": "') + compress(_PIECE) * pieces + compress(b'"}\n' + line("sound"))


def _one_frame() -> bytes:
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        for _ in range(PIECES):
            writer.write(_PIECE)
        writer.write(b"\n" + line("sound"))
    return out.getvalue()


def _tar_member() -> bytes:
    """A member whose data are there, and a sound one behind it."""
    size = PIECES * len(_PIECE)
    head = member("a.json", b"", size=size)
    sound = member("b.json", line("sound")) + TAR_END
    parts = [head, *[_PIECE] * PIECES, sound]
    return b"".join(zstandard.compress(part) for part in parts)


def _long_text() -> bytes:
    text = zstandard.compress(_PIECE) * PIECES
    return text + zstandard.compress(b"\n<|endoftext|>\nsound")


def _nested() -> bytes:
    """A compressed member that becomes large, and a sound one behind it."""
    return member("a.jsonl.zst", _long_line(zstandard.compress, PIECES)) + TAR_END


def _row_group() -> bytes:
    """One row group of 800 texts, 1 MiB each, in pages of zeros."""
    out = io.BytesIO()
    table = pa.table({"text": ["a" * (1 << 20)] * 800})
    pq.write_table(table, out, compression="zstd", use_dictionary=False)
    return out.getvalue()


def _dictionary() -> bytes:
    """One text of 16 MiB that 2,000 rows share."""
    out = io.BytesIO()
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2000), pa.array(["a" * (16 << 20)]))
    pq.write_table(pa.table({"text": text}), out, compression="zstd")
    return out.getvalue()


# name: the file, and how many documents and bad records it holds
BOMBS: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "x.jsonl.gz": (lambda: _long_line(gzip.compress, PIECES), 1, 1),
    "x.jsonl.bz2": (lambda: _long_line(bz2.compress, PIECES), 1, 1),
    "x.jsonl.zst": (lambda: _long_line(zstandard.compress, PIECES), 1, 1),
    "frame.jsonl.zst": (_one_frame, 1, 1),
    "x.tar.zst": (_tar_member, 1, 1),
    "x.jsonl.xz": (lambda: _long_line(partial(lzma.compress, preset=0), PIECES), 1, 1),
    "x.jsonl.lz4": (lambda: _long_line(lz4, PIECES), 1, 1),
    "x.txt.zst": (_long_text, 1, 1),
    "nested.tar": (_nested, 1, 1),
    "x.parquet": (_dictionary, 2000, 0),
    "group.parquet": (_row_group, 800, 0),
}


def main() -> None:
    name = sys.argv[1]
    whole = bad = 0
    error = ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(BOMBS[name][0]())
        size = path.stat().st_size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            for document in documents(path, name):
                if isinstance(document, bytes):
                    whole += 1
                else:
                    bad += 1
        except ShardError as caught:
            error = str(caught)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = len(list(Path(folder).iterdir()))
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({
        "documents": whole, "bad": bad, "error": error, "file_bytes": size, "files": files,
        "before_bytes": before * unit, "peak_bytes": after * unit,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
