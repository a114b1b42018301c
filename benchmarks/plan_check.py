"""Does `plan` foretell what runs do? Predictions beside runs on this machine.

    python -m benchmarks.plan_check [--docs FOLDER] [--rounds R] [--megabytes N]

Three runs over HTTP from a server on the loopback address, each with little more than the smallest
budget: tokens into files; training that waits for its pipeline (a model of one small layer, shards
from a server that sends 150 kB a second in all: no tokenizer is slower than MLX on a CPU);
training that its pipeline waits for (the demonstration's model). Every round plans anew, on a
cache of its own, and then runs; medians of the ratios are printed: run / plan, for the tokens a
second without the start, and for the peak of the disk. Goals: 15 % and 5 %.

The machine should be quiet: a plan is of a machine with nothing else on it, and it says so.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks import corpus, measure
from pipeline import demo
from pipeline.benching import command, program

_GOAL_RATE, _GOAL_DISK = 0.15, 0.05
_NAMES = ("tokenize", "pipeline-bound", "trainer-bound")
_SLOW_BYTES_PER_S, _PIECE_BYTES = 150_000, 8192
_TINY = {
    "dimensions": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1},
    "attention": {"num_heads": 1},
}
_DEMO = {
    "dimensions": {"hidden_size": 96, "intermediate_size": 256, "num_layers": 4},
    "attention": {"num_heads": 2, "num_kv_heads": 1},
}


class _Slow(demo.DemoHandler):
    """All its connections together send so much a second."""

    turn = threading.Lock()

    def send_body(self, data: bytes) -> None:
        """A piece at a time."""
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            with self.turn:
                time.sleep(len(piece) / _SLOW_BYTES_PER_S)
            self.wfile.write(piece)


@contextmanager
def slowly(folder: Path) -> Iterator[str]:
    """Serve a folder slowly; yields its URL."""
    handler = functools.partial(_Slow, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def config(name: str, folder: Path) -> tuple[str, Path]:
    """Kind and configuration file of one of the three runs."""
    model = _TINY if name == "pipeline-bound" else _DEMO
    updates, batch = (1000, 64) if name == "pipeline-bound" else (60, 16)
    context = 64 if name == "pipeline-bound" else 128
    plain: dict[str, Any] = {
        "name": name,
        "data": {
            "preprocessing": {"max_context_size": context},
            "tokenizer": {"name": "gpt2", "vocab_size": 512 if model is _TINY else 1024},
            "stream": {"lanes": 4, "prefetch": 1, "block_bytes": 1 << 20, "slot_windows": 32},
        },
        "model": model,
        "training": {
            "hyperparameters": {
                "iters": updates, "batch_size": batch, "gradient_accumulation_steps": 1,
            },
        },
        "logging": {"max_log_mb": 0.4, "keep_checkpoints": 1, "runs_dir": str(folder)},
    }  # fmt: skip
    if name == "tokenize":
        plain["data"]["stream"] |= {"epochs": 1, "shuffle": False}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(plain))
    return ("tokenize" if name == "tokenize" else "train"), file


def one(name: str, pattern: str, folder: Path) -> dict[str, float]:
    """Plan and run once; ratios run / plan."""
    folder.mkdir()
    kind, file = config(name, folder)
    shards = ("--config", file, "--shards", pattern)
    plan = ("plan", "--kind", kind, *shards)
    smallest = command(*plan, "--max-disk", "35")["smallest_bytes"]
    budget = f"{1.02 * smallest / 1e9 + 1e-6:.9f}"
    told = command(*plan, "--max-disk", budget)
    if kind == "tokenize":
        run = program("tokenize", *shards, "--out", folder / "out", "--max-disk", budget)
    else:
        run = program("start", *shards, "--max-disk", budget)
    began = max(run["startup_s"][name] for name in ("first_worker_up", "consumer_ready"))
    rate = run["tokens"] / (run["wall_s"] - began)
    waited = run["data_wait_share"] or 0.0
    return {
        "rate": rate / told["forecast"]["tokens_per_s"],
        "disk": run["peak_disk_bytes"] / told["forecast"]["peak_disk_bytes"],
        "told_rate": told["forecast"]["tokens_per_s"],
        "rate_was": rate,
        "told_disk": told["forecast"]["peak_disk_bytes"],
        "disk_was": run["peak_disk_bytes"],
        "told_wait": told["forecast"]["wait_share"] or 0.0,
        "wait_was": waited,
    }


def report(name: str, rounds: list[dict[str, float]]) -> list[Any]:
    """A line of the table."""
    middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    good = abs(middle["rate"] - 1) <= _GOAL_RATE, abs(middle["disk"] - 1) <= _GOAL_DISK
    each = " ".join(f"{one['rate']:.2f}" for one in rounds)
    return [
        name, f"{middle['told_rate']:,.0f}", f"{middle['rate_was']:,.0f}",
        f"{middle['rate']:.2f} ({each}) {'held' if good[0] else 'NOT HELD'}",
        f"{middle['told_disk'] / 1e6:.2f}", f"{middle['disk_was'] / 1e6:.2f}",
        f"{middle['disk']:.3f} {'held' if good[1] else 'NOT HELD'}",
        f"{100 * middle['told_wait']:.0f} / {100 * middle['wait_was']:.0f} %",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--form", default="tar.bz2")
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=list(_NAMES))
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    print(measure.machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        originals = corpus.source_documents(args.docs)
        texts = list(corpus.documents(originals, args.megabytes * 10**6, 1))
        paths = corpus.write(folder / "all", texts, 24, args.form)
        few = corpus.write(
            folder / "few", texts[: 24 * len(texts) // args.megabytes], 24, args.form
        )
        with demo.served(paths[0].parent) as (url, _), slowly(few[0].parent) as slow:
            for number in range(args.rounds):
                os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{number}")
                for name in args.only:
                    base = slow if name == "pipeline-bound" else url
                    pattern = f"{base}/shard-{{00000..00023}}.{args.form}"
                    place = folder / f"{number}-{name}"
                    found[name].append(one(name, pattern, place))
                    shutil.rmtree(place)
                print(f"round {number + 1} of {args.rounds} done", flush=True)
    header = ["run", "told tokens/s", "was", "run / plan (rounds)", "told peak MB", "was",
              "run / plan", "waits told / was"]  # fmt: skip
    print("\n" + measure.table(header, [report(name, rounds) for name, rounds in found.items()]))
    measure.save("plan_check", found)


if __name__ == "__main__":
    main()
