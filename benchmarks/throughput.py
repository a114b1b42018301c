"""Tokens per second and CPU seconds per million tokens: ours by format and number of tokenizers,
and the design that it replaces, on the same shards in the same run.

    python -m benchmarks.throughput [--docs FOLDER] [--megabytes N] [--rounds R]

Costs are marginal: a large run minus a small one, so that start-up and imports cancel. Contestants
alternate; medians over the rounds are printed, with each ratio to WebDataset's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import corpus

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / ".peers-venv"


def ours(shards: list[Path], workers: int) -> dict[str, Any]:
    """`fineweb-pipeline tokenize --json` as a user runs it."""
    with tempfile.TemporaryDirectory() as out:
        command = [Path(sys.executable).parent / "fineweb-pipeline", "tokenize", "--json"]
        command += ["--plain", "--out", out, "--workers", str(workers)]
        for shard in shards:
            command += ["--shards", str(shard)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def webdataset(shards: list[Path], workers: int) -> dict[str, Any]:
    """WebDataset + DataLoader + tiktoken in its own environment."""
    command = [PEERS / "bin" / "python", ROOT / "benchmarks" / "peer_webdataset.py", str(workers)]
    done = subprocess.run(
        [*command, *map(str, shards)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def marginal(large: dict[str, Any], small: dict[str, Any]) -> dict[str, float]:
    """Cost of the tokens that the large run has more than the small one."""
    tokens = large["tokens"] - small["tokens"]
    wall, cpu = large["wall_s"] - small["wall_s"], large["cpu_s"] - small["cpu_s"]
    return {"tokens_per_s": tokens / wall, "cpu_s_per_mtok": 1e6 * cpu / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--megabytes", type=int, default=48, help="text of the large run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=list(corpus.FORMATS))
    args = parser.parse_args()
    originals = corpus.source_documents(args.docs)
    with tempfile.TemporaryDirectory() as scratch:
        sets = {}
        for size, seed in (("large", 2), ("small", 1)):
            share = args.megabytes * 10**6 // (1 if size == "large" else 4)
            texts = list(corpus.documents(originals, share, seed))
            for form in args.formats:
                sets[form, size] = corpus.write(Path(scratch) / size, texts, 8, form)
        contestants: list[tuple[str, str, int, Any]] = [
            ("fineweb-pipeline", form, workers, ours) for form in args.formats for workers in (1, 2)
        ]
        if PEERS.exists() and "tar.bz2" in args.formats:
            contestants += [("WebDataset", "tar.bz2", workers, webdataset) for workers in (1, 2)]
        results: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            hashes: dict[str, set[str]] = {"large": set(), "small": set()}
            for name, form, workers, contestant in contestants:
                runs = {size: contestant(sets[form, size], workers) for size in hashes}
                for size, run in runs.items():
                    if run["sha256"]:
                        hashes[size].add(run["sha256"])
                one = marginal(runs["large"], runs["small"])
                results.setdefault((name, form, workers), []).append(one)
            assert all(len(one) == 1 for one in hashes.values()), f"ids differ: {hashes}"
    report(results)


def report(results: dict[tuple[str, str, int], list[dict[str, float]]]) -> None:
    """A Markdown table."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("numpy", "pyarrow", "tiktoken")
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python ", end="")
    print(f"{platform.python_version()}, {versions}\n")
    print("| contestant | shards | workers | tokens/s | CPU s per M tokens | CPU, WebDataset = 1 |")
    print("|---|---|---|---|---|---|")
    peers = {
        workers: statistics.median(one["cpu_s_per_mtok"] for one in runs)
        for (name, _, workers), runs in results.items()
        if name == "WebDataset"
    }
    for (name, form, workers), runs in results.items():
        rate = statistics.median(one["tokens_per_s"] for one in runs)
        cpu = statistics.median(one["cpu_s_per_mtok"] for one in runs)
        ratio = f"{cpu / peers[workers]:.2f}" if workers in peers else "–"
        print(f"| {name} | {form} | {workers} | {rate:,.0f} | {cpu:.3f} | {ratio} |")


if __name__ == "__main__":
    main()
