"""The other side of tests/interop.py: a folder in transformers or mlx-lm, in their environment.

    python interop_peer.py transformers|mlx_lm FOLDER      prints one JSON line

Imports nothing of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def by_transformers(model: str, ids: np.ndarray, text: str) -> tuple[str, np.ndarray, list[int]]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    llama = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert type(llama).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        logits = llama(torch.tensor(ids[None])).logits[0].numpy()
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return version, logits, tokenizer(text)["input_ids"]


def by_mlx_lm(model: str, ids: np.ndarray, text: str) -> tuple[str, np.ndarray, list[int]]:
    from importlib import metadata

    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    llama, tokenizer = mlx_lm.load(model)
    logits: Any = llama(mx.array(ids[None]))
    version = f"mlx-lm {metadata.version('mlx-lm')}"
    return version, np.array(logits.astype(mx.float32))[0], tokenizer.encode(text)


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    ids, ours = np.load(folder / "ids.npy"), np.load(folder / "logits.npy")
    text = (folder / "text.txt").read_bytes().decode()
    load = {"transformers": by_transformers, "mlx_lm": by_mlx_lm}[peer]
    version, logits, their_ids = load(str(folder / "model"), ids[: len(ours)], text)
    print(
        json.dumps(
            {
                "version": version,
                "difference": float(np.abs(logits - ours).max()),
                "largest": float(np.abs(ours).max()),
                "agree": float((logits.argmax(-1) == ours.argmax(-1)).mean()),
                "ids": list(their_ids) == ids.tolist(),
                "num_ids": len(ids),
            }
        )
    )


if __name__ == "__main__":
    main()
