"""Two other loops over the same model, weights and windows, in their own environment.

    python peer_training.py plain|mlx_lm MODEL WINDOWS.npy BATCH WARMUP UPDATES LR COMPILE BLAS…

plain: the loop of MLX's own examples (mlx-examples, transformer_lm): a compiled step of
value_and_grad and optimizer.update, one eval a step. mlx_lm: mlx-lm's tuner, full weights. Both
train mlx-lm's Llama with MLX's AdamW. Prints one JSON line. Imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

for library in sys.argv[9:]:  # the BLAS that our trainer takes: the same for all
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx import nn, optimizers  # noqa: E402

mx.set_default_device(mx.cpu)


def plain(model: Any, optimizer: Any, windows: Any, batch: int, warmup: int, updates: int) -> Any:
    def loss_of(model: Any, rows: mx.array) -> mx.array:
        logits = model(rows[:, :-1])
        return nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean")

    loss_and_grad = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(rows: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, rows)
        optimizer.update(model, gradients)
        return loss

    losses, begin, cpu = [], 0.0, 0.0
    for number in range(warmup + updates):
        if number == warmup:
            begin, cpu = time.perf_counter(), time.process_time()
            mx.reset_peak_memory()
        loss = step(mx.array(windows[number * batch : (number + 1) * batch]))
        mx.eval(state)
        losses.append(loss.item())
    return losses, time.perf_counter() - begin, time.process_time() - cpu


def by_mlx_lm(
    model: Any, optimizer: Any, windows: Any, batch: int, warmup: int, updates: int
) -> Any:
    from mlx_lm.tuner import trainer

    def batches(dataset: Any, batch_size: int, **_: Any) -> Any:
        lengths = mx.array([[0, windows.shape[1]]] * batch_size)
        for at in range(0, len(dataset), batch_size):
            yield mx.array(dataset[at : at + batch_size]), lengths

    class Callback:
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.begin = self.cpu = 0.0

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            self.losses.append(info["train_loss"])
            if info["iteration"] == warmup:
                self.begin, self.cpu = time.perf_counter(), time.process_time()
                mx.reset_peak_memory()

    callback = Callback()
    arguments = trainer.TrainingArgs(
        batch_size=batch,
        iters=warmup + updates,
        steps_per_report=1,
        steps_per_save=10**9,
        max_seq_length=windows.shape[1],
        adapter_file="/dev/null",
        clear_cache_threshold=1 << 60,
    )
    save, mx.save_safetensors = mx.save_safetensors, lambda *_: None  # not what is measured
    trainer.train(
        model, optimizer, windows, None, arguments,
        iterate_batches=batches, training_callback=callback,
    )  # fmt: skip
    mx.save_safetensors = save
    seconds, cpu = time.perf_counter() - callback.begin, time.process_time() - callback.cpu
    return callback.losses, seconds, cpu


def main() -> None:
    import mlx_lm

    who, folder, file = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    batch, warmup, updates = map(int, sys.argv[4:7])
    if sys.argv[8] == "0":
        mx.disable_compile()
    model, _ = mlx_lm.load(folder)
    model.train()
    optimizer = optimizers.AdamW(
        learning_rate=float(sys.argv[7]),
        betas=[0.9, 0.95],
        weight_decay=0.0,
        bias_correction=True,
    )
    windows = np.load(file)
    losses, seconds, cpu = {"plain": plain, "mlx_lm": by_mlx_lm}[who](
        model, optimizer, windows, batch, warmup, updates
    )
    print(
        json.dumps(
            {
                "losses": losses,
                "tokens_per_s": updates * batch * (windows.shape[1] - 1) / seconds,
                "cpu_s_per_mtok": 1e6 * cpu / (updates * batch * (windows.shape[1] - 1)),
                "peak_bytes": mx.get_peak_memory(),
                "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
