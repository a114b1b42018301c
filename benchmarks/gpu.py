"""The user's model on one GPU: right first, then how fast, where the time goes, and beside PyTorch.

    python -m benchmarks.gpu [SECTION …] --docs FOLDER --out FOLDER

Sections, in this order by default (each prints a table and writes SECTION.json):

    correct   loss and gradient norm against the CPU's, same batch and weights
    memory    tokens/s, MFU and peak memory per micro-batch, one batch in memory
    parts     where the time of a micro-step and an update goes
    torch     the same model in PyTorch (torch.compile, bfloat16, its fused attention)
    live      the same updates fed by the live pipeline: stall share and ratio to memory
    scaling   the pipeline alone, 1 … all CPUs
    long      updates on real text, then a resume of a CPU's checkpoint on the GPU and back

Needs one CUDA or Metal GPU; `torch` needs PyTorch. Every timing has warmed up, repeats, and takes
the median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from trainer import blas

LIBRARY = blas.preload()  # before mlx is imported

import mlx.core as mx  # noqa: E402

from benchmarks import corpus, gpu_parts, gpu_runs  # noqa: E402
from pipeline import encoding, model_size, settings  # noqa: E402
from pipeline.config import Config  # noqa: E402
from trainer.loop import Loop  # noqa: E402
from trainer.process import PEAK_FLOPS  # noqa: E402

ROOT = Path(__file__).parent.parent
CONFIG = "model-config-80m-fineweb"
SEQUENCES = 64  # per update
MICRO_BATCHES = (8, 16, 32, 64)
TORCH_MICRO_BATCHES = (16, 32)  # each is compiled for about a minute
UPDATES = 12  # timed, after 3 that are not


def user_config(micro_batch: int, **system: Any) -> Config:
    """The user's configuration with another split of the same 64 sequences."""
    return settings.load(
        CONFIG,
        {
            "training.hyperparameters.batch_size": micro_batch,
            "training.hyperparameters.gradient_accumulation_steps": SEQUENCES // micro_batch,
            **{f"system.{key}": value for key, value in system.items()},
        },
    )


def rows_of(docs: Path | None, config: Config, count: int) -> np.ndarray:
    """Windows of real text, shape (count, T + 1), uint16."""
    tokenizer, T = config.data.tokenizer, config.data.preprocessing.max_context_size
    encoder = encoding.load(tokenizer.name, tokenizer.vocab_size)
    raw = [text.encode() for text in corpus.source_documents(docs)]
    offsets = np.cumsum([0, *map(len, raw)])
    text = np.frombuffer(b"".join(raw), np.uint8)
    tokens = encoder.encode_block(text, offsets, False)
    starts = np.arange(count) * T % (len(tokens) - T - 1)
    return np.stack([tokens[at : at + T + 1] for at in starts])


class Bench:
    """What all sections share.

    Args:
        docs: Folder of parquet files with real text, or None for this Python's own library.
        out: Folder of results.
        micro_batches: Sequences of a micro-step; each divides 64.
    """

    def __init__(self, docs: Path | None, out: Path, micro_batches: list[int]) -> None:
        self.docs, self.out, self.micro_batches = docs, out, micro_batches
        self.config = user_config(8)
        self.vocab_size = self.config.data.tokenizer.vocab_size or 50257
        self.seq_len = self.config.data.preprocessing.max_context_size
        self.flops = model_size.flops_per_token(self.config.model, self.vocab_size, self.seq_len)
        name = str(mx.device_info(mx.default_device()).get("device_name"))
        self.device, self.peak = name, PEAK_FLOPS.get(name)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation by PaLM's count, where the chip's peak is published."""
        return tokens_per_s * self.flops / self.peak if self.peak else None

    def save(self, section: str, result: Any) -> None:
        (self.out / f"{section}.json").write_text(json.dumps(result, indent=1))


# ── right ───────────────────────────────────────────────────────────────────────────────────


def correct(bench: Bench) -> None:
    """Loss and gradient norm of one window: GPU in bfloat16 and float32 against the CPU."""
    rows = mx.array(rows_of(bench.docs, bench.config, 1))
    gpu = mx.default_device()
    loop = Loop(bench.config, bench.vocab_size, mx.float32)
    weights = {name: np.array(w) for name, w in loop.weights.items()}
    results = {}
    for label, device, dtype in (
        ("CPU float32", mx.cpu, mx.float32),
        ("GPU float32", gpu, mx.float32),
        ("GPU bfloat16", gpu, mx.bfloat16),
    ):
        mx.set_default_device(device)
        loop.dtype = dtype
        here = {name: mx.array(w) for name, w in weights.items()}

        def mean_loss(tree: Any, loop: Loop = loop) -> mx.array:
            return loop._loss(tree, rows) * loop.update_tokens / bench.seq_len

        loss, gradients = mx.value_and_grad(mean_loss)(here)
        norm = mx.sqrt(sum((g.astype(mx.float32) ** 2).sum() for g in gradients.values()))
        results[label] = {"loss": loss.item(), "grad_norm": norm.item()}
    mx.set_default_device(gpu)
    want = results["CPU float32"]
    print("| where | loss | gradient norm | loss − CPU's | norm / CPU's |\n|---|---|---|---|---|")
    for label, got in results.items():
        off, ratio = got["loss"] - want["loss"], got["grad_norm"] / want["grad_norm"]
        print(
            f"| {label} | {got['loss']:.5f} | {got['grad_norm']:.4f} | {off:+.5f} | {ratio:.4f} |"
        )
    bench.save("correct", results)
    off = abs(results["GPU bfloat16"]["loss"] - want["loss"])
    assert off < 2**-8 * want["loss"], f"bfloat16's loss is off by {off}"  # one bf16 rounding
    assert abs(results["GPU float32"]["loss"] - want["loss"]) < 1e-3, "float32's loss is off"


# ── fast ────────────────────────────────────────────────────────────────────────────────────


def in_memory(bench: Bench, micro_batch: int, updates: int = UPDATES) -> dict[str, Any]:
    """The trainer's own loop over one batch that stays in memory."""
    config = user_config(micro_batch)
    loop = Loop(config, bench.vocab_size, mx.bfloat16)
    rows = [mx.array(row) for row in rows_of(bench.docs, config, micro_batch)]
    mx.eval(rows)
    mx.reset_peak_memory()
    seconds: list[float] = []
    for number in range(updates + 3):
        begin = time.perf_counter()
        loop.update(lambda: rows, lambda: {"wait_s": 0.0})
        loop.metrics()  # of the update before: what the trainer does
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
    last = loop.metrics(flush=True)[-1]
    rate = loop.update_tokens / statistics.median(seconds)
    return {
        "micro_batch": micro_batch,
        "tokens_per_s": rate,
        "mfu": bench.mfu(rate),
        "update_s": statistics.median(seconds),
        "spread": max(seconds) / min(seconds),
        "peak_gb": mx.get_peak_memory() / 1e9,
        "loss": last["loss"],
    }


def memory(bench: Bench) -> None:
    """Throughput and peak memory per micro-batch."""
    results = []
    print("| micro-batch | tokens/s | MFU | update | peak memory |\n|---|---|---|---|---|")
    for micro_batch in bench.micro_batches:
        try:
            one = in_memory(bench, micro_batch)
        except RuntimeError as error:  # out of memory on a smaller card
            print(f"| {micro_batch} | {str(error)[:60]} | | | |")
            continue
        results.append(one)
        share = f"{100 * one['mfu']:.1f} %" if one["mfu"] else "–"
        print(
            f"| {micro_batch} | {one['tokens_per_s']:,.0f} | {share} | "
            f"{1e3 * one['update_s']:.0f} ms | {one['peak_gb']:.1f} GB |"
        )
        mx.clear_cache()
    bench.save("memory", results)


def parts(bench: Bench) -> None:
    """See gpu_parts."""
    bench.save("parts", gpu_parts.report(bench.config, bench.vocab_size, bench.peak))


def torch(bench: Bench) -> None:
    """PyTorch in a process of its own, on the same windows."""
    rows = bench.out / "rows.npy"
    np.save(rows, rows_of(bench.docs, bench.config, max(MICRO_BATCHES)).astype(np.int64))
    command = [sys.executable, "-m", "benchmarks.gpu_torch", str(rows)]
    done = subprocess.run(
        [*command, *map(str, TORCH_MICRO_BATCHES)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    rows.unlink()
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours = {}
    if (bench.out / "memory.json").exists():
        for one in json.loads((bench.out / "memory.json").read_text()):
            ours[one["micro_batch"]] = one["tokens_per_s"]
    print("| PyTorch, micro-batch | tokens/s | MFU | peak memory | MLX / PyTorch |")
    print("|---|---|---|---|---|")
    for one in results:
        one["mfu"] = bench.mfu(one["tokens_per_s"])
        ratio, share = ours.get(one["micro_batch"], 0.0) / one["tokens_per_s"], one["mfu"] or 0.0
        print(
            f"| {one['micro_batch']} | {one['tokens_per_s']:,.0f} | {100 * share:.1f} % | "
            f"{one['peak_gb']:.1f} GB | {ratio:.2f} |"
        )
    bench.save("torch", results)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "correct": correct,
    "memory": memory,
    "parts": parts,
    "torch": torch,
    "live": lambda bench: bench.save(
        "live", gpu_runs.live(bench.docs, bench.out, bench.micro_batches)
    ),
    "scaling": lambda b: b.save("scaling", gpu_runs.scaling(b.docs, b.out)),
    "long": lambda b: b.save("long", gpu_runs.long(b.docs, b.out)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--micro-batches", type=int, nargs="*", default=MICRO_BATCHES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not mx.is_available(mx.gpu):
        sys.exit("there is no GPU that MLX can use; on Linux install mlx[cuda13]")
    bench = Bench(args.docs, args.out, args.micro_batches)
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("mlx", "numpy", "tiktoken"))
    print(f"{bench.device}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}")
    print(f"{bench.flops / 1e9:.3f} GFLOP per token; BLAS of the CPU: {LIBRARY}")
    for name in args.sections or SECTIONS:
        print(f"\n## {name}\n", flush=True)
        begin = time.perf_counter()
        SECTIONS[name](bench)
        print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main()
