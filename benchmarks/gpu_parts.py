"""Where the time of a micro-step and of an update goes: each part alone, on real shapes.

Used by benchmarks/gpu.py. A part is repeated until it takes a tenth of a second, five times; the
median counts. What the parts do not explain of the whole micro-step is gaps between kernels and
whatever runs slower beside its neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from pipeline import model_size
from pipeline.config import Config
from trainer import optim
from trainer.loop import Loop

_ROUNDS = 5
_ROUND_S = 0.1


def seconds(part: Callable[[], Any]) -> float:
    """Median seconds of one call, the queue kept full."""
    mx.eval(part())
    mx.eval(part())
    repeats, taken = 1, []
    while True:
        begin = time.perf_counter()
        for _ in range(repeats):
            mx.async_eval(out := part())
        mx.eval(out)
        took = time.perf_counter() - begin
        if took >= _ROUND_S:
            taken.append(took / repeats)
            if len(taken) == _ROUNDS:
                return statistics.median(taken)
        else:
            repeats = max(repeats + 1, int(repeats * 1.3 * _ROUND_S / took))


def both(function: Callable[..., mx.array], *inputs: mx.array) -> Callable[[], Any]:
    """The function's forward and backward pass from a given output gradient, compiled."""
    out = function(*inputs)
    cotangent = (mx.random.normal(out.shape) * 1e-2).astype(out.dtype)
    mx.eval(cotangent)

    @mx.compile
    def passes(cotangent: mx.array, *args: mx.array) -> Any:
        return mx.vjp(function, list(args), [cotangent])

    return lambda: passes(cotangent, *inputs)


def report(config: Config, vocab_size: int, peak: float | None, batch: int = 16) -> Any:
    """Measure and print all parts.

    Args:
        config: The model's.
        vocab_size: V.
        peak: FLOP/s of the chip, or None.
        batch: Sequences of a micro-step.
    """
    T, L = config.data.preprocessing.max_context_size, config.model.dimensions.num_layers
    D, F = config.model.dimensions.hidden_size, config.model.dimensions.intermediate_size
    heads, kv_heads, head_dim = model_size.shape_of(config.model)
    tokens, half = batch * T, mx.bfloat16

    def draw(*shape: int, scale: float = 1.0) -> mx.array:
        return (mx.random.normal(shape) * scale).astype(half)

    x = draw(batch, T, D)
    q, k = draw(batch, heads, T, head_dim), draw(batch, kv_heads, T, head_dim)
    w_q, w_kv = draw(heads * head_dim, D, scale=0.02), draw(kv_heads * head_dim, D, scale=0.02)
    w_up, w_down = draw(F, D, scale=0.02), draw(D, F, scale=0.02)
    wide = draw(batch, T, F)
    head, targets = draw(vocab_size, D, scale=0.02), mx.random.randint(0, vocab_size, (batch, T))
    logits, norm = draw(batch, T, vocab_size), mx.ones((D,), half)
    loop = Loop(config, vocab_size, half)
    gradients = {name: mx.random.normal(w.shape) * 1e-3 for name, w in loop.weights.items()}
    mx.eval(x, q, k, w_q, w_kv, w_up, w_down, wide, head, targets, logits, gradients)
    scale = head_dim**-0.5

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(x, head_dim, traditional=False, base=10000.0, scale=1.0, offset=0)

    attention_flops = 4 * batch * heads * T * T * head_dim
    rows: list[tuple[str, int, float, Callable[[], Any]]] = [
        ("attention, forward", L, attention_flops, lambda: attend(q, k, k)),
        ("attention, both", L, 3 * attention_flops, both(attend, q, k, k)),
        ("q and o products, both", 2 * L, 6 * tokens * D * heads * head_dim,
         both(lambda x, w: x @ w.T, x, w_q)),
        ("k and v products, both", 2 * L, 6 * tokens * D * kv_heads * head_dim,
         both(lambda x, w: x @ w.T, x, w_kv)),
        ("gate and up products, both", 2 * L, 6 * tokens * D * F,
         both(lambda x, w: x @ w.T, x, w_up)),
        ("down product, both", L, 6 * tokens * D * F,
         both(lambda x, w: x @ w.T, wide, w_down)),
        ("silu(gate) × up, both", L, 0.0,
         both(lambda a, b: (a * mx.sigmoid(a)) * b, wide, wide + 1)),
        ("two norms, both", 2 * L, 0.0,
         both(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), x, norm)),
        ("rope of q, both", L, 0.0, both(rope, q)),
        ("rope of k, both", L, 0.0, both(rope, k)),
        ("head product, both", 1, 6 * tokens * D * vocab_size,
         both(lambda x, w: x @ w.T, x, head)),
        ("cross-entropy, both", 1, 0.0,
         both(lambda x: mx.fast.cross_entropy(x, targets), logits)),
    ]  # fmt: skip
    print(f"Micro-step of {batch} sequences:\n\n| part | times | ms | share | TFLOP/s |")
    print("|---|---|---|---|---|")
    micro = _micro_step(loop, batch, T, vocab_size)
    whole = seconds(micro)
    result: list[dict[str, Any]] = []
    explained = 0.0
    for name, times, flops, part in rows:
        took = seconds(part)
        if name != "attention, forward":  # part of the next row
            explained += times * took
        rate = flops / took / 1e12
        result.append({"part": name, "times": times, "s": took, "tflops": rate})
        said = f"{rate:.0f}" if flops else "–"
        share = 100 * times * took / whole
        print(f"| {name} | {times} | {1e3 * times * took:.2f} | {share:.1f} % | {said} |")
    print(f"| gaps and the rest | | {1e3 * (whole - explained):.2f} | "
          f"{100 * (1 - explained / whole):.1f} % | |")  # fmt: skip
    rate = model_size.flops_per_token(config.model, vocab_size, T) * tokens / whole
    used = f", {100 * rate / peak:.1f} % of peak" if peak else ""
    print(f"| whole micro-step | | {1e3 * whole:.2f} | 100 % | {rate / 1e12:.0f}{used} |")
    result.append({"part": "whole micro-step", "times": 1, "s": whole, "tflops": rate / 1e12})
    return result + _update(loop, gradients)


def _micro_step(loop: Loop, batch: int, T: int, vocab_size: int) -> Callable[[], Any]:
    windows = list(mx.random.randint(0, vocab_size, (batch, T + 1)).astype(mx.uint16))
    mx.eval(windows)
    zero = mx.array(0.0)
    return lambda: loop._micro(loop.weights, loop._zeros, zero, windows)


def _update(loop: Loop, gradients: dict[str, mx.array]) -> list[dict[str, Any]]:
    """The parts of an update that happen once, whatever the number of micro-steps."""
    stacks: dict[tuple[int, ...], list[mx.array]] = {}
    for name, gradient in gradients.items():
        if optim.is_hidden_matrix(name, gradient):
            stacks.setdefault(gradient.shape, []).append(gradient.astype(loop.dtype))
    stacked = [mx.stack(matrices) for matrices in stacks.values()]
    mx.eval(stacked)
    steps = loop.config.training.optimization.ns_steps
    newton = mx.compile(lambda many: [optim.orthogonalize(G, steps) for G in many])
    one, loss = mx.array(1.0), mx.array(3.0)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("Newton-Schulz", lambda: newton(stacked)),
        ("whole update", lambda: loop._apply(loop.weights, loop.state, gradients, loss, one)),
    ]
    print("\n| once an update | ms |\n|---|---|")
    result = []
    for name, part in parts:
        took = seconds(part)
        print(f"| {name} | {1e3 * took:.2f} |")
        result.append({"part": name, "times": 1, "s": took})
    return result
