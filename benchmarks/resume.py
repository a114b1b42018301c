"""How long a resume inside a shard takes, by the shard's size and by where in it.

    python -m benchmarks.resume --docs FOLDER [--megabytes 25 100 200] [--json]

A block near the end is asked for as a decompressor asks: once behind the blocks before it (the
shard read from its start), once at the place that the cursor has kept. Both in this process, in
turns; CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import corpus
from benchmarks.measure import table
from pipeline.blocks import BlockData, blocks
from pipeline.codecs import open_documents
from pipeline.encoding import safe_cut
from pipeline.messages import BlockStart

_BLOCK_BYTES = 4 << 20
_ROUNDS = 3


def _first(path: Path, skip: int, begin: BlockStart | None) -> tuple[float, BlockData]:
    """CPU seconds until the block behind those skipped is there, and the block."""
    start = time.process_time()
    documents = open_documents(
        str(path), path.name, "text", begin=begin.entry if begin is not None else None
    )
    found = blocks(
        documents,
        block_bytes=_BLOCK_BYTES,
        max_documents=_BLOCK_BYTES // 64,
        cut=safe_cut("gpt2"),
        begin=begin,
    )
    block = next(islice(found, skip, None))
    documents.close()  # type: ignore[attr-defined]
    return time.process_time() - start, block


def measure(path: Path) -> dict[str, Any]:
    """Both ways to a block in the last tenth of a shard."""
    documents = open_documents(str(path), path.name, "text")
    rule: Any = {"block_bytes": _BLOCK_BYTES, "max_documents": _BLOCK_BYTES // 64}
    places = [block.next for block in blocks(documents, cut=safe_cut("gpt2"), **rule)]
    number = max(1, len(places) * 9 // 10)
    place = places[number - 1]
    assert place is not None
    behind, inside = [], []
    for _ in range(_ROUNDS):
        seconds, expected = _first(path, number, None)
        behind.append(seconds)
        seconds, block = _first(path, 0, place)
        inside.append(seconds)
        assert block.lengths == expected.lengths
    return {
        "form": path.name.split(".", 1)[1],
        "shard_bytes": path.stat().st_size,
        "block": number,
        "blocks": len(places),
        "from_start_s": round(statistics.median(behind), 4),
        "inside_s": round(statistics.median(inside), 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a column text")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 100, 200])
    parser.add_argument("--forms", nargs="+", default=["parquet", "tar.bz2", "jsonl.zst"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    originals = corpus.source_documents(options.docs)
    rows = []
    for megabytes in options.megabytes:
        texts = list(corpus.documents(originals, megabytes * 10**6, seed=1))
        for form in options.forms:
            with tempfile.TemporaryDirectory() as folder:
                (path,) = corpus.write(Path(folder), texts, 1, form)
                done = {"text_mb": megabytes, **measure(path)}
            rows.append(done)
            if options.json:
                print(json.dumps(done), flush=True)
    if not options.json:
        print(table(["text MB", "form", "shard MB", "block", "from its start, s", "inside, s"], [
            [row["text_mb"], row["form"], round(row["shard_bytes"] / 1e6), row["block"],
             row["from_start_s"], row["inside_s"]] for row in rows
        ]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
