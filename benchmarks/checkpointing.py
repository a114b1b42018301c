"""What a checkpoint costs training: how long it stops, and how much slower updates are meanwhile.

    python -m benchmarks.checkpointing [--hidden N] [--layers N] [--device gpu]

The loop trains on drawn tokens; a checkpoint is begun every few updates, as the trainer does it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline import settings
from pipeline.messages import Cursor, LaneCursor
from trainer import blas

blas.preload()

import mlx.core as mx  # noqa: E402

from trainer import checkpoint, saved  # noqa: E402
from trainer.loop import Loop  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"hidden": 512, "layers": 8, "vocab": 8192, "context": 128, "batch": 2}
    for name, default in {**sizes, "saves": 3, "every": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    args = parser.parse_args()
    dtype = saved.use_device(args.device)
    overrides = {
        "model.dimensions.hidden_size": args.hidden,
        "model.dimensions.intermediate_size": args.hidden * 11 // 4,
        "model.dimensions.num_layers": args.layers,
        "model.attention.num_heads": args.hidden // 64,
        "model.attention.num_kv_heads": args.hidden // 128,
        "data.preprocessing.max_context_size": args.context,
        "training.hyperparameters.batch_size": args.batch,
        "training.optimization.optimizer": "adamw",
        "training.hyperparameters.learning_rate": 1e-3,
    }
    loop = Loop(settings.load("demo", overrides), args.vocab, dtype)
    rng = np.random.default_rng(0)
    cursor = Cursor("", {}, (LaneCursor(0, 0, 0, 0),))
    stops, writes = [], []
    updates: dict[bool, list[float]] = {True: [], False: []}
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoint.Writer(Path(folder), loop.config.logging)
        begun = 0.0
        for number in range(1, args.saves * args.every + args.every):
            writing, begin = writer.busy, time.perf_counter()
            rows = rng.integers(0, args.vocab, (args.batch, args.context + 1))
            loop.update(lambda rows=rows: [mx.array(one) for one in rows], lambda: {"wait_s": 0.0})  # type: ignore[misc]
            loop.metrics()
            updates[writing].append(time.perf_counter() - begin)
            if writer.busy and writer.done:
                writes.append(time.perf_counter() - begun)
                size = writer.result()[2]
            if (
                number % args.every == 0
                and not writer.busy
                and number < args.saves * args.every + 1
            ):
                loop.metrics(flush=True)
                begun = time.perf_counter()
                writer.begin(checkpoint.snapshot(loop, cursor))
                stops.append(time.perf_counter() - begun)
        if writer.busy:
            size = writer.result()[2]
            writes.append(time.perf_counter() - begun)
    count = sum(array.size for array in loop.weights.values())
    print(f"{count / 1e6:.1f} M parameters, {size / 1e6:.0f} MB on disk at most, {dtype}\n")
    print("| | ms, median |\n|---|---|")
    for name, values in (
        ("training stops for a checkpoint", stops),
        ("until it is durable, at most", writes),
        ("an update, nothing being written", updates[False][2:]),
        ("an update beside the writing", updates[True]),
    ):
        shown = f"{1e3 * statistics.median(values):,.1f}" if values else "–"
        print(f"| {name} | {shown} |")


if __name__ == "__main__":
    main()
