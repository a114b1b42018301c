"""A plain loop in one process, as in nanochat: row groups, tiktoken's threads, a token buffer.

The loop of nanochat's tokenizing dataloader in its own numbers: 128 documents a call of
encode_ordinary_batch with num_threads = workers, ids appended to a buffer that batches are taken
from. Its buffer is a Python deque of integers; here each document's list becomes an array at
once, which is cheaper. jsonl.zst is read by zstandard and orjson, the fastest there are.
"""

import itertools
import pathlib

import numpy as np
import orjson
import peer_common
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_DOCUMENTS = 128


def texts(shards):
    for path in shards:
        if path.endswith(".parquet"):
            shard = pq.ParquetFile(path)
            for group in range(shard.num_row_groups):
                column = shard.read_row_group(group, columns=["text"])
                yield from column["text"].to_pylist()
        else:
            with pathlib.Path(path).open("rb") as file:
                raw = zstandard.ZstdDecompressor().stream_reader(file).read()
            yield from (orjson.loads(line)["text"] for line in raw.splitlines())


def ids(workers, shards):
    encoding, source = peer_common.gpt2(), texts(shards)
    while documents := list(itertools.islice(source, _DOCUMENTS)):
        for one in encoding.encode_ordinary_batch(documents, num_threads=workers):
            one.insert(0, peer_common.EOT)
            yield np.array(one, np.uint16)


def load(workers, shards):
    pa.set_cpu_count(workers)
    return peer_common.batches(ids(workers, shards))


peer_common.run(load)
