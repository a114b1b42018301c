"""Does what `export` writes load elsewhere, and give the same logits and ids?

    python -m tests.interop [RUN …]

Exports models of every kind (drawn at random: tied and not, with and without biases, both rotary
orders, whole and cut vocabularies) and those of the runs named, loads each with transformers'
LlamaForCausalLM on torch and with mlx-lm, and compares their logits with ours, and their token
ids of real text with ours. The two live in tests/.interop-venv, which is made on the first call:
about a gigabyte, so this is a command and no part of bin/test. Exit code 1 if anything differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness import ROOT, english
from trainer import blas

blas.preload()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from pipeline import checkpoints, encoding, settings  # noqa: E402
from trainer import saved  # noqa: E402
from trainer.export import export  # noqa: E402
from trainer.model import Llama, initialize  # noqa: E402
from trainer.saved import Saved  # noqa: E402

ENVIRONMENT = ROOT / "tests" / ".interop-venv"
REQUIREMENTS = ROOT / "tests" / "interop-requirements.txt"
PEERS = ("transformers", "mlx_lm")
TOLERANCE = 2e-5  # of the largest logit: float32, sums in another order
_TOKENS = 96
KINDS: dict[str, dict[str, Any]] = {
    "tied, 1,024 tokens": {"data.tokenizer.vocab_size": 1024},
    "untied, biases, whole gpt2": {
        "data.tokenizer.vocab_size": None,
        "model.misc.tie_word_embeddings": False,
        "model.misc.attention_bias": True,
        "model.misc.mlp_bias": True,
    },
    "neighbouring rotary pairs, 32,000 tokens": {
        "data.tokenizer.vocab_size": 32_000,
        "model.rope.traditional": True,
        "model.attention.head_dim": 32,
    },
}


def drawn(changes: dict[str, Any]) -> Saved:
    """A model with random weights, large enough that every part of it shows in the logits."""
    config = settings.load("demo", changes)
    tokenizer = config.data.tokenizer
    encoder = encoding.load(tokenizer.name, tokenizer.vocab_size)
    model = Llama(config.model, encoder.vocab_size)
    mx.random.seed(7)
    initialize(model, config.model)
    weights = {
        name: array * 4 if array.ndim > 1 else array + 0.3 * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.parameters())
    }
    return Saved(Path("drawn"), 0, 0, config, encoder, weights)


def prepare(one: Saved, folder: Path) -> None:
    """The export, and what the peers are compared with: ids of a text, and logits of its start."""
    export(one, folder / "model", "float32")
    text = "\n".join(english(12)) + " naïve 日本語 🙂  \n\n  12345 it's\tI'LL  \r\n x"
    raw = np.frombuffer(text.encode(), np.uint8)
    ids = one.encoder.encode_block(raw, np.array([0, len(raw)]), False)
    logits = one.model(mx.float32)(mx.array(ids[None, :_TOKENS]))
    np.save(folder / "ids.npy", ids.astype(np.int64))
    np.save(folder / "logits.npy", np.array(logits.astype(mx.float32))[0])
    (folder / "text.txt").write_bytes(text.encode())


def compare(peer: str, folder: Path) -> dict[str, Any]:
    """What the peer, in a process of its own, makes of the folder."""
    command = [ENVIRONMENT / "bin" / "python", ROOT / "tests" / "interop_peer.py", peer, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_environment() -> None:
    """Make tests/.interop-venv, unless it is there."""
    ready = ENVIRONMENT / "ready"
    if ready.exists() and ready.read_bytes() == REQUIREMENTS.read_bytes():
        return
    print(f"making {ENVIRONMENT}: once, some minutes", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-q", "-r", REQUIREMENTS]
    subprocess.run(pip, check=True)
    ready.write_bytes(REQUIREMENTS.read_bytes())


def main() -> None:
    make_environment()
    saved.use_device("cpu")
    models = {name: drawn(changes) for name, changes in KINDS.items()}
    models |= {run: saved.load(checkpoints.find(run, None)) for run in sys.argv[1:]}
    print("| model | loaded by | largest difference of logits | same next token | ids |")
    print("|---|---|---|---|---|")
    failed = False
    for name, one in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            prepare(one, Path(scratch))
            for peer in PEERS:
                result = compare(peer, Path(scratch))
                if "error" in result:
                    print(f"| {name} | {peer} | {result['error']} | | |")
                    failed = True
                    continue
                ids = "same" if result["ids"] else "DIFFERENT"
                print(
                    f"| {name} | {result['version']} | {result['difference']:.1e} of "
                    f"{result['largest']:.1f} | {result['agree']:.0%} | {ids} of "
                    f"{result['num_ids']} |"
                )
                close = result["difference"] <= TOLERANCE * result["largest"]
                failed |= not (close and result["ids"] and result["agree"] == 1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
