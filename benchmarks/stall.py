"""Does the trainer wait? Updates fed by the live pipeline beside the same from one batch in memory.

    python -m benchmarks.stall [--docs FOLDER] [--rounds R] [--updates N]

The demonstration's model on this machine's CPU (benchmarks/gpu.py has the section `live` for
the large model on a GPU). Live is `fineweb-pipeline start` on local tar.bz2 shards, its figures
from metrics.jsonl; in memory is the trainer's own loop in a process of its own with nothing
beside it. Both take turns. The rate is all tokens over all time after the first updates; the
stall share is the time that the trainer waited for data over all time.

The picture is benchmarks/pictures/stall.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import corpus, measure, pictures
from pipeline import config as configuration
from pipeline import encoding, settings

_CONFIG = "demo"
_SKIPPED = 10  # first updates: buffers are allocated, the ring fills
_TEXT_BYTES = 48_000_000
_GOAL_RATIO, _GOAL_STALL = 0.98, 0.005


def live(shards: list[Path], folder: Path, updates: int) -> list[dict[str, Any]]:
    """Metrics of every update of one run."""
    arguments = [part for shard in shards for part in ("--shards", str(shard))]
    file = folder / "config.yaml"
    settings = {"name": "live", "system": {"time_limit_s": None}, "logging": {"max_log_mb": 8}}
    file.write_text(yaml.safe_dump(_merged(settings)))
    measure.program(
        "start", "--config", file, *arguments, "--max-disk", "1", "--steps", str(updates),
        "--runs-dir", folder,
    )  # fmt: skip
    lines = (folder / "live" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    """The demonstration's configuration as plain values, with some sections' keys changed."""
    plain = configuration.to_plain(settings.load(_CONFIG, {}))
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) else value
    plain["logging"]["steps"]["checkpoint_interval"] = 10**6  # the step alone is compared
    plain["logging"]["sample_prompt"] = None
    return plain


def in_memory(updates: int) -> list[float]:
    """Seconds of every update of the trainer's own loop over one batch."""
    from trainer import blas

    blas.preload()
    import mlx.core as mx

    from trainer.loop import Loop

    config = settings.load(_CONFIG, {"training.hyperparameters.iters": updates})
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    tokenizer, T = config.data.tokenizer, config.data.preprocessing.max_context_size
    loop = Loop(config, encoding.load(tokenizer.name, tokenizer.vocab_size).vocab_size, mx.float32)
    size = (config.training.hyperparameters.batch_size, T + 1)
    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size or 1000, size, np.uint16)
    rows = [mx.array(row) for row in ids]
    mx.eval(rows)
    seconds = []
    for _ in range(updates):
        begin = time.perf_counter()
        loop.update(lambda: rows, lambda: {"wait_s": 0.0})
        loop.metrics()  # of the update before: what the trainer does
        seconds.append(time.perf_counter() - begin)
    return seconds


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    rates: dict[str, list[list[float]]] = {"in memory": [], "live pipeline": []}
    ratios, waited, took = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        texts = list(corpus.documents(corpus.source_documents(args.docs), _TEXT_BYTES, 1))
        shards = corpus.write(Path(scratch), texts, 8, "tar.bz2")
        for number in range(args.rounds):
            folder = Path(scratch) / f"runs-{number}"
            folder.mkdir()
            steps = live(shards, folder, args.updates)[_SKIPPED:]
            command = [sys.executable, "-m", "benchmarks.stall", "--in-memory"]
            command += ["--updates", str(args.updates)]
            seconds = measure.json_of(command)["seconds"][_SKIPPED:]
            size = steps[0]["tokens_per_s"] * steps[0]["step_s"]  # tokens of an update
            rates["live pipeline"].append([size / step["step_s"] for step in steps])
            rates["in memory"].append([size / one for one in seconds])
            ours = sum(step["step_s"] for step in steps)
            ratios.append(sum(seconds) / len(seconds) / (ours / len(steps)))
            waited += sum(step["data_wait_share"] * step["step_s"] for step in steps)
            took += ours
    return {
        "machine": measure.machine(),
        "tokens_per_s": rates,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "stall_share": waited / took,
    }


def report(result: dict[str, Any]) -> None:
    """Rates, ratio, stall share."""
    print(f"\n{result['machine']}\n")
    rows = [
        [name, f"{statistics.median([rate for one in rounds for rate in one]):,.0f}"]
        for name, rounds in result["tokens_per_s"].items()
    ]
    print(measure.table(["fed", "tokens/s, median update"], rows))
    each = ", ".join(f"{one:.3f}" for one in result["ratios"])
    print(f"\nlive / in memory: {result['ratio']:.3f} (goal {_GOAL_RATIO}; rounds: {each})")
    print(f"waited for data: {100 * result['stall_share']:.3f} % (goal {100 * _GOAL_STALL:.1f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--in-memory", action="store_true", help="only that, once, as JSON")
    args = parser.parse_args()
    if args.in_memory:
        print(json.dumps({"seconds": in_memory(args.updates)}))
        return
    result = run(args)
    report(result)
    measure.save("stall", result)
    pictures.draw("stall", result)


if __name__ == "__main__":
    main()
