"""What the benchmarks share: shards, floors, tables; whole runs are pipeline/benching.py's.

Runs in: benchmarks. `table` is pure.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks import corpus
from pipeline.benching import (
    Run,
    json_of,
    marginal,
    median,
    pinned,
    program,
    tokenize,
    worker_counts,
)
from pipeline.sizes import usable_cpus as cpus

__all__ = ["Run", "cpus", "json_of", "marginal", "median", "pinned", "program", "tokenize",
           "worker_counts"]  # fmt: skip

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "benchmarks"
Costs = dict[str, Any]


def role(process: psutil.Process) -> str:
    """What a process of the program is. Raises: psutil.Error: it has ended."""
    command = process.cmdline()
    if not command:  # a zombie has none
        raise psutil.NoSuchProcess(process.pid)
    child = "pipeline.child"
    return command[command.index(child) + 1] if child in command else "supervisor"


# ── shards ──────────────────────────────────────────────────────────────────────────────────

Sets = dict[tuple[str, str], list[Path]]


def shard_sets(folder: Path, docs: Path | None, megabytes: int, formats: Sequence[str]) -> Sets:
    """Shards of a large run and of a small one, a quarter as large and of other text, by
    (format, size). Nothing that a process learns of a text outlives it, so all rounds share
    them."""
    originals = corpus.source_documents(docs)
    sets: Sets = {}
    for size, share, seed in (("large", 1, 1), ("small", 4, 2)):
        texts = list(corpus.documents(originals, megabytes * 10**6 // share, seed))
        for form in formats:
            sets[form, size] = corpus.write(folder / size, texts, 8, form)
    return sets


# ── costs ───────────────────────────────────────────────────────────────────────────────────


def floor(form: str, sets: Sets) -> Costs:
    """The bare library calls on one core (benchmarks/floor.py), in CPU seconds per million
    tokens: decode, parse, encode, tiktoken, and limit: the first three together."""
    command = [sys.executable, "-m", "benchmarks.floor", form]
    for option, size in (("--warm", "small"), ("--timed", "large")):
        command += [option, *map(str, sets[form, size])]
    with pinned(1):
        found = json_of(command)
    per_mtok = 1e6 / found["tokens"]
    costs = {
        name: found[f"{name}_s"] * per_mtok for name in ("decode", "parse", "encode", "tiktoken")
    }
    return {**costs, "limit": costs["decode"] + costs["parse"] + costs["encode"]}


# ── results ─────────────────────────────────────────────────────────────────────────────────


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine() -> str:
    """What the figures were measured on."""
    names = ("numpy", "pyarrow", "tiktoken", "rapidgzip", "zstandard", "msgspec")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    said = f"{_processor()}, {cpus()} CPUs, Python {platform.python_version()}, {versions}"
    load = os.getloadavg()[0]
    return f"{said}; load when it began {load:.1f}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((one.split(": ")[1] for one in lines if one.startswith("model name")), "CPU")


def save(name: str, result: Any) -> Path:
    """Keep a result for the pictures and for later comparison."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1))
    return path
