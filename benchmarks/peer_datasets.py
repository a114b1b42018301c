"""Hugging Face datasets: streaming, a batched map with tiktoken, PyTorch's DataLoader over shards.

Set up as its documentation says is fastest: streaming=True over files that are local; only the
text column is read (parquet) or kept (JSON); with_format("arrow"), so that a batch reaches the
map as a table and no row becomes a Python dictionary; map(batched=True); and for several
processes a DataLoader, over whose workers an IterableDataset divides its shards (IterableDataset
has no num_proc). A map's batch becomes one row of token ids: rows of single documents, which the
documentation's examples yield, cost far more in the loop over them.
"""

import numpy as np
import peer_common
import pyarrow as pa
import torch
from datasets import load_dataset
from datasets.utils.logging import set_verbosity_error

_DOCUMENTS = 256  # of a map's batch: about as many tokens as two training batches hold


class Encode:
    """A table of texts to a table with one row: their token ids. Made in the worker."""

    def __init__(self):
        self.encoding = None

    def __call__(self, table):
        self.encoding = self.encoding or peer_common.gpt2()
        ids = peer_common.encode(self.encoding, table["text"].to_pylist())
        return pa.table({"ids": pa.ListArray.from_arrays([0, len(ids)], pa.array(ids))})


def to_tensor(table):
    """One row's ids, in the worker, as what crosses to the main process."""
    ids = table["ids"].chunk(0).flatten().to_numpy()
    return torch.from_numpy(ids.astype(np.int32))


def load(workers, shards):
    set_verbosity_error()
    if shards[0].endswith(".parquet"):
        dataset = load_dataset(
            "parquet", data_files=shards, split="train", streaming=True, columns=["text"]
        )
    else:
        dataset = load_dataset("json", data_files=shards, split="train", streaming=True)
        dataset = dataset.select_columns(["text"])
    dataset = dataset.with_format("arrow").map(
        Encode(), batched=True, batch_size=_DOCUMENTS, remove_columns=["text"]
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=to_tensor
    )
    return peer_common.batches(row.numpy() for row in loader)


peer_common.run(load)
