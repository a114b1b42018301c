"""`batch_size: auto`: as many windows at once as memory holds.

Runs in: trainer. An update keeps its number of windows: gradient_accumulation_steps counts them,
and the batch is one of its divisors. Two micro-steps of one and of two windows are computed on
drawn tokens, and what the second one's peak has more is what a window takes.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import psutil

from pipeline import checkpoints
from pipeline.config import Config, from_plain
from trainer.loop import Loop

_SHARE = 0.85  # of the GPU's memory
_CPU_SHARE = 0.5  # of the memory that is free now: the pipeline and its page cache live there
_CPU_MOST = 8  # larger products are no faster on a CPU


def settle(
    config: Config, vocab_size: int, dtype: mx.Dtype, eot: int, checkpoint: str | None
) -> Config:
    """The configuration with a number in the place of auto.

    Args:
        config: The run's.
        vocab_size: Of the tokenizer.
        dtype: To compute in.
        eot: See Loop.
        checkpoint: A resumed run keeps the batch of its checkpoint: another one would round
            otherwise, and the resume would not be bitwise equal.
    """
    hyper = config.training.hyperparameters
    if hyper.batch_size != "auto":
        return config
    windows = hyper.gradient_accumulation_steps
    if checkpoint is not None:
        before = from_plain(checkpoints.read(Path(checkpoint)).state.config)
        batch = before.training.hyperparameters.batch_size
        if isinstance(batch, int) and windows % batch == 0:
            return with_batch(config, batch)
    one, two = (_peak_bytes(with_batch(config, n, 1), vocab_size, dtype, eot) for n in (1, 2))
    return with_batch(config, largest(windows, one, two, memory_bytes()))


def largest(windows: int, one_bytes: int, two_bytes: int, memory_bytes: int) -> int:
    """The largest divisor of windows whose micro-step fits, at least 1. Pure.

    Args:
        windows: Of an update.
        one_bytes: Peak memory with one window at once.
        two_bytes: The same with two.
        memory_bytes: What may be used.
    """
    each = max(two_bytes - one_bytes, 1)
    fit = 1 + max(0, memory_bytes - one_bytes) // each
    return max(n for n in range(1, windows + 1) if windows % n == 0 and n <= max(1, fit))


def memory_bytes() -> int:
    """What training may use of the device's memory."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info(mx.gpu)
        whole = info.get("max_recommended_working_set_size") or info.get("total_memory")
        return int(_SHARE * int(whole or info["memory_size"]))
    return int(_CPU_SHARE * psutil.virtual_memory().available)


def with_batch(config: Config, batch: int, steps: int | None = None) -> Config:
    """The configuration with this batch and the accumulation steps that keep the windows."""
    hyper = config.training.hyperparameters
    hyper = msgspec.structs.replace(
        hyper,
        batch_size=batch,
        gradient_accumulation_steps=steps or hyper.gradient_accumulation_steps // batch,
    )
    training = msgspec.structs.replace(config.training, hyperparameters=hyper)
    return msgspec.structs.replace(config, training=training)


def _peak_bytes(config: Config, vocab_size: int, dtype: mx.Dtype, eot: int) -> int:
    """Peak memory of a whole update of one micro-step."""
    mx.clear_cache()
    mx.reset_peak_memory()
    loop = Loop(config, vocab_size, dtype, eot)
    T = config.data.preprocessing.max_context_size
    shape = int(loop.hyper.batch_size), T + 1
    rows = np.random.default_rng(0).integers(0, vocab_size, shape)
    for _ in range(2):  # the second one holds the first one's results, as in training
        loop.update(lambda: [mx.array(row) for row in rows], lambda: {"wait_s": 0.0})
    loop.metrics(flush=True)
    mx.eval(loop.weights, loop.state)
    peak = mx.get_peak_memory()
    del loop
    mx.clear_cache()
    return peak
