"""The floor under every contestant: the bare library calls that nobody can avoid, on one core.

    python -m benchmarks.floor FORMAT --warm SHARD... --timed SHARD...      prints one JSON line

Process: one of its own, so that its CPU time is all its own. Decode: rapidgzip, zstandard, or
pyarrow's read of the one column. Parse: msgspec, of nothing but the text of each record, from
bytes that are in memory already. Encode: the columnar encoder on whole blocks, and beside it
tiktoken document by document. Both encoders have seen the warm shards before: what is compared
with this is the cost of a large run minus that of a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rapidgzip
import zstandard

from pipeline import encoding
from pipeline.blocks import blocks
from pipeline.config import Stream

_CHUNK_BYTES = 1 << 20
_MIN_DOCUMENT_BYTES = 64  # as the program plans its blocks


class _Record(msgspec.Struct):
    text: str


def _drain(stream: object) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    while stream.readinto(buffer):  # type: ignore[attr-defined]
        pass


def _bz2(path: Path) -> None:
    with rapidgzip.IndexedBzip2File(str(path), parallelization=1) as stream:
        _drain(stream)


def _zst(path: Path) -> None:
    with path.open("rb") as file:
        _drain(zstandard.ZstdDecompressor().stream_reader(file))


def _column(path: Path) -> None:
    shard = pq.ParquetFile(path)
    for group in range(shard.num_row_groups):
        shard.read_row_group(group, columns=["text"], use_threads=False)


DECODE: dict[str, Callable[[Path], None]] = {
    "tar.bz2": _bz2,
    "jsonl.zst": _zst,
    "parquet": _column,
}


def _records(path: Path, form: str) -> Iterator[bytes]:
    """The JSON objects of a shard; none for parquet, which holds no JSON."""
    if form == "tar.bz2":
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()
    elif form == "jsonl.zst":
        with path.open("rb") as file:
            raw = zstandard.ZstdDecompressor().stream_reader(file).read()
        yield from (line for line in BytesIO(raw) if line.strip())


def _texts(path: Path, form: str) -> list[bytes]:
    if form == "parquet":
        return [text.encode() for text in pq.read_table(path)["text"].to_pylist()]
    decode = msgspec.json.Decoder(_Record).decode
    return [decode(record).text.encode() for record in _records(path, form)]


def _seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _blocks(texts: list[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Text and offsets of blocks, cut by the program's rule."""
    size = Stream().block_bytes
    cut = blocks(
        texts,
        block_bytes=size,
        max_documents=size // _MIN_DOCUMENT_BYTES,
        cut=encoding.safe_cut("gpt2"),
    )
    return [
        (np.frombuffer(b"".join(block.pieces), np.uint8), np.cumsum([0, *block.lengths]))
        for block in cut
    ]


def _encode(warm: list[bytes], timed: list[bytes]) -> tuple[float, int]:
    """CPU seconds of the columnar encoder on the timed texts, and their tokens."""
    encoder = encoding.load("gpt2", None)
    for text, offsets in _blocks(warm):
        encoder.encode_block(text, offsets, False)
    prepared = _blocks(timed)
    counts: list[int] = []

    def run() -> None:
        for text, offsets in prepared:
            counts.append(len(encoder.encode_block(text, offsets, False)))

    return _seconds(run), sum(counts)


def _tiktoken(texts: list[bytes]) -> float:
    reference = encoding.whole("gpt2")
    strings = [text.decode() for text in texts]

    def run() -> None:
        for text in strings:
            reference.encode_to_numpy(text, disallowed_special=())

    return _seconds(run)


def measure(form: str, warm: list[Path], timed: list[Path]) -> dict[str, float]:
    """CPU seconds of each bare call on the timed shards; the tokens in them."""
    pa.set_cpu_count(1)
    decode_s = sum(_seconds(lambda path=path: DECODE[form](path)) for path in timed)
    parse_s = 0.0
    decode = msgspec.json.Decoder(_Record).decode
    for path in timed:
        records = list(_records(path, form))
        parse_s += _seconds(lambda records=records: [None for one in records if not decode(one)])
    texts = [text for path in timed for text in _texts(path, form)]
    encode_s, tokens = _encode([text for path in warm for text in _texts(path, form)], texts)
    return {
        "decode_s": decode_s,
        "parse_s": parse_s,
        "encode_s": encode_s,
        "tiktoken_s": _tiktoken(texts),
        "tokens": tokens,
        "text_bytes": sum(map(len, texts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("form", choices=list(DECODE))
    parser.add_argument("--warm", type=Path, nargs="+", required=True)
    parser.add_argument("--timed", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    print(json.dumps(measure(args.form, args.warm, args.timed)))


if __name__ == "__main__":
    main()
