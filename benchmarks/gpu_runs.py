"""Whole runs of `fineweb-pipeline` on a GPU machine: live training, scaling, a long run.

Used by benchmarks/gpu.py. Every run is the command that a user gives, in processes of its own.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import corpus

ROOT = Path(__file__).parent.parent
SEQUENCES = 64
LIVE_UPDATES, LIVE_SKIPPED = 26, 6  # the first updates compile and fill the ring
LONG_UPDATES = 300
SHARDS, SHARD_BYTES = 16, 40_000_000
SCALING_BYTES_PER_WORKER = 320_000_000


def command(*arguments: str | Path) -> dict[str, Any]:
    """Run the program and return its JSON result."""
    call = [sys.executable, "-c", "from pipeline.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(
        [*call, "--json", "--plain"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one_shard(docs: Path | None, folder: Path, number: int) -> Path:
    texts = list(corpus.documents(corpus.source_documents(docs), SHARD_BYTES, number + 1))
    made = corpus.write(folder / f"part-{number}", texts, 1, "parquet")[0]
    return made.rename(folder / f"shard-{number:05d}.parquet")


def shards(docs: Path | None, out: Path) -> list[Path]:
    """Reshuffled real text as parquet, made once by all cores."""
    folder = out / "shards"
    made = sorted(folder.glob("*.parquet"))
    if len(made) == SHARDS:
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor() as pool:
        work = [pool.submit(_one_shard, docs, folder, number) for number in range(SHARDS)]
        return sorted(one.result() for one in work)


def _config(path: Path, **changes: Any) -> Path:
    """The user's configuration with some dotted keys changed, as a file."""
    plain = yaml.safe_load((ROOT / "configs" / "model-config-80m-fineweb.yaml").read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        at = plain
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    path.write_text(yaml.safe_dump(plain))
    return path


def _steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def live(docs: Path | None, out: Path, micro_batches: list[int]) -> list[dict[str, Any]]:
    """Training with the live pipeline: rate, stall share, and ratio to a batch in memory."""
    paths = shards(docs, out)
    memory = {}
    if (out / "memory.json").exists():
        memory = {o["micro_batch"]: o for o in json.loads((out / "memory.json").read_text())}
    print("| micro-batch | tokens/s live | in memory | live / memory | waits for data |")
    print("|---|---|---|---|---|")
    results = []
    for micro_batch in micro_batches:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            file = _config(
                Path(scratch) / "config.yaml",
                name="live",
                training__hyperparameters__batch_size=micro_batch,
                training__hyperparameters__gradient_accumulation_steps=SEQUENCES // micro_batch,
                logging__keep_checkpoints=1,
            )
            arguments = ["--config", file, "--runs-dir", scratch, "--steps", str(LIVE_UPDATES)]
            for path in paths:
                arguments += ["--shards", path]
            command("start", *arguments)
            steps = _steps(Path(scratch) / "live")[LIVE_SKIPPED:]
        took = statistics.median(step["step_s"] for step in steps)
        rate = steps[0]["tokens_per_s"] * steps[0]["step_s"] / took
        waited = sum(s["data_wait_share"] * s["step_s"] for s in steps)
        stall = waited / sum(s["step_s"] for s in steps)
        known = memory.get(micro_batch, {}).get("tokens_per_s")
        result = {"micro_batch": micro_batch, "tokens_per_s": rate, "stall_share": stall}
        result["ratio"] = rate / known if known else None
        results.append(result)
        print(
            f"| {micro_batch} | {rate:,.0f} | {known or 0:,.0f} | {result['ratio'] or 0:.3f} | "
            f"{100 * stall:.2f} % |",
            flush=True,
        )
    return results


def scaling(docs: Path | None, out: Path) -> list[dict[str, Any]]:
    """`tokenize` with 1 … all CPUs; the text grows with the workers, so runs last alike."""
    cpus = os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 6, 8, 12, 16, 24, 32) if count <= cpus]
    paths = shards(docs, out)
    print("| tokenizers | decompressors | tokens/s | MB/s | × one | CPU s per M tokens | GB RSS |")
    print("|---|---|---|---|---|---|---|")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        for count in counts:
            copies = -(-count * SCALING_BYTES_PER_WORKER // (SHARDS * SHARD_BYTES))
            folder = Path(scratch) / str(count)
            folder.mkdir()
            for copy in range(copies):
                for path in paths:
                    (folder / f"{copy:03d}-{path.name}").hardlink_to(path)
            # the cost of a start is taken off by a run on one shard
            small = _tokenize(paths[0], Path(scratch) / "out", count)
            large = _tokenize(folder, Path(scratch) / "out", count)
            tokens, wall = large["tokens"] - small["tokens"], large["wall_s"] - small["wall_s"]
            cpu = (large["cpu_s"] - small["cpu_s"]) * 1e6 / tokens
            one = {
                "workers": count,
                "decompressors": _decompressors(Path(scratch) / "out"),
                "tokens_per_s": tokens / wall,
                "mb_per_s": (large["text_bytes"] - small["text_bytes"]) / wall / 1e6,
                "cpu_s_per_mtok": cpu,
                "peak_rss_gb": large["peak_rss_bytes"] / 1e9,
                "wall_s": large["wall_s"],
            }
            results.append(one)
            print(
                f"| {count} | {one['decompressors']} | {one['tokens_per_s']:,.0f} | "
                f"{one['mb_per_s']:.0f} | {one['tokens_per_s'] / results[0]['tokens_per_s']:.2f} "
                f"| {cpu:.3f} | {one['peak_rss_gb']:.2f} |",
                flush=True,
            )
    return results


def _decompressors(out: Path) -> int:
    """How many the program has chosen, as its log says."""
    said = re.search(r"workers_chosen .*decompressors=(\d+)", (out / "log.txt").read_text())
    assert said is not None
    return int(said[1])


def _tokenize(source: Path, out: Path, workers: int) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    return command(
        "tokenize", "--shards", source, "--out", out, "--workers", str(workers), "--lanes", "8",
        "--max-disk", "1000",
    )  # fmt: skip


def long(docs: Path | None, out: Path) -> dict[str, Any]:
    """One update on the CPU, 300 on the GPU from its checkpoint, one more on the CPU."""
    paths = shards(docs, out)
    run = out / "long"
    shutil.rmtree(run, ignore_errors=True)
    stages = [("cpu", 1, 1, 1), ("gpu", 32, 2, 1 + LONG_UPDATES), ("cpu", 1, 1, 2 + LONG_UPDATES)]
    result: dict[str, Any] = {"stages": []}
    for number, (device, batch, accumulation, steps) in enumerate(stages):
        file = _config(
            out / f"long-{number}.yaml",
            name="long",
            training__hyperparameters__batch_size=batch,
            training__hyperparameters__gradient_accumulation_steps=accumulation,
            training__scheduler__warmup_steps=50,
            logging__keep_checkpoints=1,
            logging__sample_prompt="The court held that" if number == 1 else None,
            system__device=device,
        )
        arguments = ["--config", file, "--runs-dir", out, "--steps", str(steps)]
        for path in paths:
            arguments += ["--shards", path]
        summary = command("start", *arguments)
        done = _steps(run)
        print(
            f"{device}: to update {done[-1]['step']}, loss {done[-1]['loss']:.3f}, "
            f"{summary['wall_s']:.0f} s {summary.get('sample', '')!r}",
            flush=True,
        )
        result["stages"].append({"device": device, "loss": done[-1]["loss"], **summary})
    result["loss"] = [(step["step"], step["loss"]) for step in _steps(run)]
    result["tokens_per_s"] = [step["tokens_per_s"] for step in _steps(run)]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return result
