"""How long an update takes here: a child of `plan`, since only the trainer's processes import mlx.

Process: python -m trainer.calibrate SECONDS, started by pipeline/planning.py with the configuration
on its standard input. Prints one JSON line.

A few real micro-steps and one real optimizer step, within the time that is allowed. A model for
which a whole micro-step would take longer is timed on fewer or shorter windows, and the time is
taken to grow as the FLOPs do.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from pipeline import encoding, model_size
from pipeline.config import Config, from_plain
from trainer import blas

_FIRST_TOKENS = 64  # of the probe that tells how fast the machine is
_SHARE = 0.25  # of the time, for one measured micro-step
_MEASURED = 3


class _Probe:
    """A loop of the run's model, and how its parts are timed.

    Args:
        config: The run's, with a number of windows in the place of auto.
        half: Computes in bfloat16.
    """

    def __init__(self, config: Config, half: bool) -> None:
        import mlx.core as mx

        from trainer.loop import Loop

        tokenizer = config.data.tokenizer
        vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)
        self.mx, self.config, self.vocab_size = mx, config, vocabulary.size
        self.loop = Loop(config, vocabulary.size, mx.bfloat16 if half else mx.float32,
                         vocabulary.eot)  # fmt: skip
        self.gradients: Any = None

    def flops(self, batch: int, tokens: int) -> float:
        """Of a micro-step."""
        per_token = model_size.flops_per_token(self.config.model, self.vocab_size, tokens)
        return float(per_token) * batch * tokens

    def micro(self, batch: int, tokens: int) -> tuple[float, float]:
        """Wall and CPU seconds of one micro-step of so many windows."""
        rng = np.random.default_rng(0)
        rows = [self.mx.array(row) for row in rng.integers(0, self.vocab_size, (batch, tokens + 1))]
        self.mx.eval(rows)
        self.gradients = None  # else two of them are in memory
        begin, cpu = time.perf_counter(), time.process_time()
        self.gradients = self.loop._first(self.loop.weights, rows)
        self.mx.eval(self.gradients)
        return time.perf_counter() - begin, time.process_time() - cpu

    def apply(self) -> float:
        """Seconds of the optimizer's step."""
        loop, (gradients, loss) = self.loop, self.gradients
        begin = time.perf_counter()
        done = loop._apply(loop.weights, loop.state, gradients, loss, self.mx.array(1.0))
        self.mx.eval(done)
        return time.perf_counter() - begin


def measure(config: Config, seconds: float) -> dict[str, Any]:
    """What plan wants to know of the trainer."""
    begin = time.perf_counter()
    import mlx.core as mx

    gpu = _choose_device(config)
    wanted = config.system.compute_dtype
    half = wanted == "bfloat16" or (wanted == "auto" and gpu)
    auto = config.training.hyperparameters.batch_size == "auto"
    from trainer import sizing

    one = sizing.with_batch(config, 1, 1)
    probe = _Probe(one, half)
    ready = time.perf_counter()
    T = config.data.preprocessing.max_context_size
    tokens = min(T, _FIRST_TOKENS)
    warm_s = probe.micro(1, tokens)[0]  # compiles on a GPU
    first = probe.micro(1, tokens) if gpu or warm_s < seconds * _SHARE else (warm_s, warm_s)
    speed = probe.flops(1, tokens) / first[0]
    affordable = seconds * _SHARE * speed
    batch = _batch(config, probe.vocab_size, half) if auto else _given(config)
    at_once, tokens = _fitting(probe, affordable, batch, T)
    mx.reset_peak_memory()
    times = [first] if (at_once, tokens) == (1, min(T, _FIRST_TOKENS)) else []
    while len(times) < _MEASURED and (
        not times or time.perf_counter() - ready < seconds * (1 - _SHARE)
    ):
        times.append(probe.micro(at_once, tokens))
    wall_s, cpu_s = min(times)
    if not gpu:
        wall_s = min(wall_s, cpu_s)  # it waits for nothing: less than one core is others' doing
    scale = probe.flops(batch, T) / probe.flops(at_once, tokens)
    apply_flops = model_size.optimizer_flops(config, probe.vocab_size)
    apply_s = apply_flops / (probe.flops(at_once, tokens) / wall_s)
    if apply_s < seconds * _SHARE:
        apply_s = min(probe.apply() for _ in range(2))
    whole = (at_once, tokens) == (batch, T)
    return {
        "device": str(mx.device_info(mx.default_device()).get("device_name", "unknown")),
        "gpu": gpu,
        "dtype": "bfloat16" if half else "float32",
        "batch_windows": batch,
        "micro_s": wall_s * scale,
        "apply_s": apply_s,
        "cores": 0.0 if gpu else max(1.0, cpu_s / wall_s),
        "peak_bytes": mx.get_peak_memory() if whole else None,
        "measured": f"{at_once} × {tokens} tokens",
        "scaled": round(scale, 3),
        "ready_s": ready - begin,
    }


def _choose_device(config: Config) -> bool:
    """As trainer/process.py does."""
    import mlx.core as mx

    wanted = config.system.device
    gpu = mx.is_available(mx.gpu) if wanted == "auto" else wanted == "gpu"
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    fuse = config.system.compile
    if fuse == "never" or (fuse == "auto" and not gpu):
        mx.disable_compile()
    return bool(gpu)


def _given(config: Config) -> int:
    batch = config.training.hyperparameters.batch_size
    assert isinstance(batch, int)
    return batch


def _batch(config: Config, vocab_size: int, half: bool) -> int:
    """What `batch_size: auto` will come to, from estimates: the run itself measures."""
    from trainer import sizing

    weights = 4 * model_size.num_parameters(config.model, vocab_size)
    fixed = 3 * weights + 2 * model_size.optimizer_bytes(config, vocab_size)
    item = 2 if half else 4
    each = model_size.activation_bytes(config, vocab_size, 1, item)
    windows = config.training.hyperparameters.gradient_accumulation_steps
    return sizing.largest(windows, fixed + each, fixed + 2 * each, sizing.memory_bytes())


def _fitting(probe: _Probe, affordable: float, batch: int, T: int) -> tuple[int, int]:
    """Windows and tokens of the largest micro-step that can be afforded."""
    tokens = T
    while tokens > _FIRST_TOKENS and probe.flops(1, tokens) > affordable:
        tokens //= 2
    if tokens < T:
        return 1, tokens
    fits = [n for n in range(1, batch + 1) if probe.flops(n, T) <= affordable]
    return max(fits, default=1), T


def main() -> None:
    """See the module."""
    config = from_plain(json.load(sys.stdin))
    blas.reproducible()
    blas.preload()  # before mlx
    print(json.dumps(measure(config, float(sys.argv[1]))))


if __name__ == "__main__":
    main()
