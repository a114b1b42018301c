"""What the commands `generate` and `export` do with a checkpoint.

Runs in: the command line's own process, which imports mlx for these commands alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trainer import blas

blas.preload()  # before mlx

from trainer import saved  # noqa: E402
from trainer.export import export as write_folder  # noqa: E402
from trainer.generate import generate as continuation  # noqa: E402


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
) -> None:
    """Print the prompt and its continuation as it comes."""
    dtype = saved.use_device(device)
    one = saved.load(checkpoint)
    model = one.model(dtype)
    print(prompt, end="", flush=True)
    begin, pieces = time.perf_counter(), 0
    for text in continuation(
        model, one.encoder, prompt,
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed,
    ):  # fmt: skip
        print(text, end="", flush=True)
        pieces += 1
    print()
    seconds = time.perf_counter() - begin
    if sys.stderr.isatty():
        print(f"{pieces / seconds:.0f} pieces/s, step {one.step}", file=sys.stderr)


def export(checkpoint: Path, out: Path, *, dtype: str) -> dict[str, object]:
    """Write the folder; what was written, for the user."""
    saved.use_device("cpu")
    one = saved.load(checkpoint)
    write_folder(one, out, dtype)
    size = sum(path.stat().st_size for path in out.iterdir())
    return {
        "out": str(out),
        "step": one.step,
        "trained_tokens": one.tokens,
        "dtype": dtype,
        "size_bytes": size,
    }
