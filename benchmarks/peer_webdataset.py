"""The design that this project replaces: WebDataset, PyTorch's DataLoader and tiktoken.

Set up as WebDataset's documentation says is fastest: sequential reads of tar shards split by
worker, no shuffle, batches made in the worker and passed whole (batch_size=None), so that few
large tensors cross between the processes. json is the decoder that WebDataset itself uses.
"""

import json

import numpy as np
import peer_common
import torch
import webdataset


class Pack(torch.utils.data.IterableDataset):
    """Documents to tokens to batches, in the DataLoader's worker."""

    def __init__(self, shards):
        self.shards = shards

    def _pieces(self):
        encoding = peer_common.gpt2()
        for sample in webdataset.WebDataset(self.shards, shardshuffle=False, empty_check=False):
            yield peer_common.encode(encoding, [json.loads(sample["json"])["text"]])

    def __iter__(self):
        for batch in peer_common.batches(self._pieces()):
            yield torch.from_numpy(batch.astype(np.int32))


def load(workers, shards):
    return torch.utils.data.DataLoader(
        Pack(shards), batch_size=None, num_workers=workers, prefetch_factor=4
    )


peer_common.run(load)
