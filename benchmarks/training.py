"""The trainer's step beside a plain MLX loop and mlx-lm's trainer, and where its time goes.

    python -m benchmarks.training [--docs FOLDER] [--rounds R] [--compile]
    python -m benchmarks.training --profile [--device gpu]

Every contestant trains the same Llama from the same weights on the same windows with AdamW, on
this machine's CPU, with the same BLAS, each in a process of its own; they take turns, and the
medians over the rounds are printed. Their losses must agree, or the work was not the same. The
peers live in tests/.interop-venv (made by `python -m tests.interop`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trial import Size, load
from pipeline import config as configuration
from pipeline import encoding, settings
from trainer import blas

LIBRARY = blas.preload()

import mlx.core as mx  # noqa: E402

from trainer import optim  # noqa: E402
from trainer.export import export  # noqa: E402
from trainer.loop import Loop  # noqa: E402
from trainer.saved import Saved  # noqa: E402

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "tests" / ".interop-venv"
_RATE, _WARMUP = 1e-3, 3
_AGREE = 2e-3  # the losses of two contestants may differ by this, rounding over the updates


def blas_files() -> list[str]:
    """What blas.preload has loaded, for the peers."""
    if LIBRARY.startswith("OpenBLAS"):
        return ["libopenblas.so.0"]
    folder = Path(sys.prefix) / "lib"
    return [str(folder / "libiomp5.so"), *map(str, sorted(folder.glob("libmkl_rt.so*"))[-1:])]


def the_config(args: argparse.Namespace, optimizer: str) -> configuration.Config:
    return settings.load(
        "demo",
        {
            "model.dimensions.hidden_size": args.hidden,
            "model.dimensions.intermediate_size": args.hidden * 11 // 4,
            "model.dimensions.num_layers": args.layers,
            "model.attention.num_heads": args.hidden // 64,
            "model.attention.num_kv_heads": max(1, args.hidden // 128),
            "data.preprocessing.max_context_size": args.context,
            "data.tokenizer.vocab_size": args.vocab,
            "training.hyperparameters.batch_size": args.batch,
            "training.hyperparameters.gradient_accumulation_steps": 1,
            "training.hyperparameters.learning_rate": _RATE,
            "training.hyperparameters.weight_decay": 0.0,
            "training.hyperparameters.gradient_clip": 1.0 if optimizer == "muon" else 0.0,
            "training.scheduler.type": "constant",
            "training.scheduler.warmup_steps": 0,
            "training.optimization.optimizer": optimizer,
        },
    )


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The trainer's loop; runs in a process of its own."""
    mx.set_default_device(mx.cpu)
    if not args.compile:
        mx.disable_compile()
    loop = Loop(the_config(args, "adamw"), args.vocab, mx.float32)
    loop.weights.update(mx.load(str(args.child / "ours.safetensors")))
    windows, batch = np.load(args.child / "windows.npy"), args.batch
    losses, begin, cpu = [], 0.0, 0.0
    for number in range(_WARMUP + args.updates):
        if number == _WARMUP:
            losses += loop.metrics(flush=True)
            mx.eval(loop.weights, loop.state)
            begin, cpu = time.perf_counter(), time.process_time()
            mx.reset_peak_memory()
        rows = windows[number * batch : (number + 1) * batch]
        loop.update(lambda rows=rows: [mx.array(one) for one in rows], lambda: {"wait_s": 0.0})  # type: ignore[misc]
        losses += loop.metrics()
    losses += loop.metrics(flush=True)
    mx.eval(loop.weights, loop.state)
    seconds = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    return {
        "losses": [one["loss"] for one in losses],
        "tokens_per_s": args.updates * batch * args.context / seconds,
        "cpu_s_per_mtok": 1e6 * cpu / (args.updates * batch * args.context),
        "peak_bytes": mx.get_peak_memory(),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Weights in both layouts, and the windows."""
    config = the_config(args, "adamw")
    loop = Loop(config, args.vocab, mx.float32)
    mx.save_safetensors(str(folder / "ours.safetensors"), loop.weights)
    encoder = encoding.load("gpt2", args.vocab)
    export(Saved(Path("drawn"), 0, 0, config, encoder, loop.weights), folder / "model", "float32")
    data = load(args.docs, Size(context=args.context, vocab=args.vocab))
    order = np.random.default_rng(0).permutation(len(data.train))
    count = (_WARMUP + args.updates) * args.batch
    np.save(folder / "windows.npy", data.train[order[:count]].astype(np.int32))


def contest(args: argparse.Namespace) -> None:
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(args, folder)
        me = [sys.executable, "-m", "benchmarks.training", "--child", folder]
        for name in ("hidden", "layers", "context", "vocab", "batch", "updates"):
            me += [f"--{name}", getattr(args, name)]
        peer = [PEERS / "bin" / "python", ROOT / "benchmarks" / "peer_training.py"]
        rest = [folder / "model", folder / "windows.npy", args.batch, _WARMUP, args.updates]
        rest += [_RATE, int(args.compile), *blas_files()]
        commands = {
            "fineweb-pipeline": me + (["--compile"] if args.compile else []),
            "plain MLX loop": [*peer, "plain", *rest],
            "mlx-lm trainer": [*peer, "mlx_lm", *rest],
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                done = subprocess.run(
                    list(map(str, command)),
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"MKL_NUM_THREADS": str(args.threads)},
                    check=False,
                )
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, results)


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table, after a look at whether all did the same work."""
    first = results["fineweb-pipeline"][0]["losses"]
    for name, runs in results.items():
        worst = max(abs(a - b) for a, b in zip(first, runs[0]["losses"], strict=True))
        if worst > _AGREE:
            sys.exit(f"{name} did other work: its losses differ by {worst:.4f}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "numpy"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {LIBRARY}, ")
    print(
        f"{versions}; compile {args.compile}; hidden {args.hidden}, {args.layers} layers, ", end=""
    )
    print(f"vocabulary {args.vocab}, {args.batch} × {args.context} tokens; {args.rounds} rounds\n")
    print(
        "| loop | tokens/s | ratio | CPU s per M tokens | ratio | peak of MLX, MB | ratio | ",
        end="",
    )
    print("peak of process, MB |\n|---|---|---|---|---|---|---|---|")
    base: dict[str, float] = {}
    for name, runs in results.items():
        middle = {
            key: statistics.median(one[key] for one in runs)
            for key in ("tokens_per_s", "cpu_s_per_mtok", "peak_bytes", "rss_bytes")
        }
        base = base or middle
        print(
            f"| {name} | {middle['tokens_per_s']:,.0f} | "
            f"{base['tokens_per_s'] / middle['tokens_per_s']:.2f} | "
            f"{middle['cpu_s_per_mtok']:,.0f} | "
            f"{middle['cpu_s_per_mtok'] / base['cpu_s_per_mtok']:.2f} | "
            f"{middle['peak_bytes'] / 1e6:,.0f} | "
            f"{middle['peak_bytes'] / base['peak_bytes']:.2f} | {middle['rss_bytes'] / 1e6:,.0f} |"
        )
    print("\nRatios: ours over theirs in tokens/s, theirs over ours else; above 1 is better.")


def profile(args: argparse.Namespace) -> None:
    """Seconds of one update by part, each made to end before the next begins."""
    gpu = args.device == "gpu"
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    if not gpu and not args.compile:
        mx.disable_compile()
    dtype = mx.bfloat16 if gpu else mx.float32
    loop = Loop(the_config(args, "muon"), args.vocab, dtype)
    data = load(args.docs, Size(context=args.context, vocab=args.vocab))
    rows = [mx.array(one) for one in data.train[: args.batch]]
    stacked = mx.stack(rows)
    options, hyper = loop.config.training.optimization, loop.hyper

    def forward() -> Any:
        return loop._loss(loop.weights, stacked)

    def both() -> Any:
        return mx.value_and_grad(loop._loss)(loop.weights, stacked)

    _, gradients = both()

    def update(optimizer: str) -> Any:
        config = the_config(args, optimizer).training.optimization
        state = loop.state if optimizer == "muon" else optim.init(loop.weights, config)
        step = optim.apply(loop.weights, gradients, state, mx.array(1.0), config, hyper, dtype)
        return step

    parts = {
        "forward": forward,
        "forward and backward": both,
        "clipping norm": lambda: optim.global_norm(gradients),
        "Muon and AdamW": lambda: update("muon"),
        "AdamW alone": lambda: update("adamw"),
    }
    print(
        f"{args.batch} × {args.context} tokens, hidden {args.hidden}, {args.layers} layers, ",
        end="",
    )
    print(f"{options.optimizer}, {dtype}\n\n| part | ms, median of {args.updates} |\n|---|---|")
    for name, part in parts.items():
        times = []
        for _ in range(args.updates + 1):
            begin = time.perf_counter()
            mx.eval(part())
            times.append(time.perf_counter() - begin)
        print(f"| {name} | {1e3 * statistics.median(times[1:]):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the BLAS")
    parser.add_argument("--compile", action="store_true", help="all compile their steps")
    parser.add_argument("--profile", action="store_true", help="ours alone: time by part")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="with --profile")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    sizes = {"hidden": 256, "layers": 6, "context": 256, "vocab": 8192, "batch": 8, "updates": 12}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(ours(args)))
    elif args.profile:
        profile(args)
    else:
        contest(args)


if __name__ == "__main__":
    main()
