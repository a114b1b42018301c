"""SPDL: a pipeline whose one stage, reading and tokenizing a piece of a shard, runs in processes.

Set up as its documentation says is fastest for work that holds the GIL: pipe(fn,
executor=ProcessPoolExecutor), concurrency = workers, and as few crossings between processes as
there can be: a piece of work is named by (path, row group) and comes back as one array of ids.
The readers are the fastest ones that Python has: pyarrow on the one column; zstandard and orjson.
SPDL is preferred to Grain here: Grain's ParquetIterDataset hands over a dictionary a row and has
no reader for jsonl.zst.
"""

import concurrent.futures
import functools
import multiprocessing
import pathlib

import orjson
import peer_common
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from spdl.pipeline import PipelineBuilder


@functools.cache
def encoding():
    """Made once a process."""
    pa.set_cpu_count(1)
    return peer_common.gpt2()


def tokens(piece):
    """(path, row group or None) → ids."""
    path, group = piece
    if group is not None:
        column = pq.ParquetFile(path).read_row_group(group, columns=["text"], use_threads=False)
        return peer_common.encode(encoding(), column["text"].to_pylist())
    with pathlib.Path(path).open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file).read()
    texts = (orjson.loads(line)["text"] for line in raw.splitlines())
    return peer_common.encode(encoding(), texts)


def pieces(shards):
    for path in shards:
        if path.endswith(".parquet"):
            yield from ((path, group) for group in range(pq.ParquetFile(path).num_row_groups))
        else:
            yield path, None


def load(workers, shards):
    # spawn: children of a fork server would be missing from the account
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as executor:
        pipeline = (
            PipelineBuilder()
            .add_source(pieces(shards))
            .pipe(tokens, executor=executor, concurrency=workers, output_order="input")
            .add_sink(2 * workers)
            .build(num_threads=1)
        )
        with pipeline.auto_stop():
            yield from peer_common.batches(pipeline.get_iterator())


if __name__ == "__main__":
    peer_common.run(load)
