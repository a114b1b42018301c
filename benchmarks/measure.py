"""What the benchmarks share: whole runs of the program, marginal costs, medians, tables.

Runs in: benchmarks. `marginal`, `median` and `table` are pure.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from benchmarks import corpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "benchmarks"
_LOOK_S = 0.05
Run = dict[str, Any]
Costs = dict[str, Any]


# ── runs ────────────────────────────────────────────────────────────────────────────────────


def program(*arguments: str | Path) -> Run:
    """Run `fineweb-pipeline … --json --plain` as a user does; its JSON result.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    command = [Path(sys.executable).parent / "fineweb-pipeline", *arguments, "--json", "--plain"]
    return json_of([str(one) for one in command])


def role(process: psutil.Process) -> str:
    """What a process of the program is. Raises: psutil.Error: it has ended."""
    command = process.cmdline()
    if not command:  # a zombie has none
        raise psutil.NoSuchProcess(process.pid)
    child = "pipeline.child"
    return command[command.index(child) + 1] if child in command else "supervisor"


class Watch:
    """CPU seconds by role of what this process starts, looked at 20 times a second from a thread:
    what a process does after the last look is missing, the same in a large run and a small one."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}
        self._others = {one.pid for one in psutil.Process().children(recursive=True)}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._over.wait(_LOOK_S):
            for process in me.children(recursive=True):
                if process.pid not in self._others:
                    self._look(process)

    def _look(self, process: psutil.Process) -> None:
        try:
            times = process.cpu_times()
            self._seen[process.pid] = role(process), times.user + times.system
        except psutil.Error:  # it has just ended: the look before counts
            return

    def by_role(self) -> dict[str, float]:
        """The account so far."""
        total: dict[str, float] = {}
        for name, seconds in self._seen.values():
            total[name] = total.get(name, 0.0) + seconds
        return total


def json_of(command: Sequence[str], environment: dict[str, str] | None = None) -> Run:
    """The JSON object in the last line that a command prints.

    Raises:
        RuntimeError: it failed, or printed nothing.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | (environment or {}),
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        said = (done.stderr or done.stdout)[-3000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def tokenize(shards: Iterable[str | Path], workers: int, *more: str) -> Run:
    """`tokenize` into a folder that is deleted again; its result, and cpu_s_by_stage."""
    arguments = [part for shard in shards for part in ("--shards", str(shard))]
    out = Path(tempfile.mkdtemp())
    try:
        with Watch() as watch:
            result = program(
                "tokenize", *arguments, "--out", out / "tokens", "--workers", str(workers), *more
            )
        return {**result, "cpu_s_by_stage": watch.by_role()}
    finally:
        shutil.rmtree(out)


@contextmanager
def pinned(cpus: int) -> Iterator[None]:
    """Only so many CPUs for this process and all that it starts meanwhile (Linux alone can)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_counts() -> list[int]:
    """1, 2, 4 … and all CPUs."""
    most = cpus()
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})


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


def marginal(large: Run, small: Run) -> Costs:
    """Cost of the tokens that the large run has more than the small one: what both pay for
    their start, imports and end cancels.

    Returns:
        tokens_per_s, cpu_s_per_mtok; where the runs say it, mb_per_s (10⁶ bytes of text) and
        stages: role → CPU seconds per million tokens.

    Raises:
        ValueError: the large run is not larger.
    """
    tokens = large["tokens"] - small["tokens"]
    if tokens <= 0:
        raise ValueError(f"a run of {large['tokens']} tokens is no larger than {small['tokens']}")
    wall = large["wall_s"] - small["wall_s"]
    costs: Costs = {
        "tokens_per_s": tokens / wall,
        "cpu_s_per_mtok": 1e6 * (large["cpu_s"] - small["cpu_s"]) / tokens,
    }
    if "text_bytes" in large:
        costs["mb_per_s"] = (large["text_bytes"] - small["text_bytes"]) / wall / 1e6
    if "cpu_s_by_stage" in large:
        before = small["cpu_s_by_stage"]
        costs["stages"] = {
            stage: 1e6 * (seconds - before.get(stage, 0.0)) / tokens
            for stage, seconds in large["cpu_s_by_stage"].items()
        }
    if "peak_rss_bytes" in large:
        costs["memory_gb"] = large["peak_rss_bytes"] / 1e9
    return costs


def median(rounds: Sequence[Costs]) -> Costs:
    """Of each figure over the rounds, also inside dictionaries of figures."""
    return {
        key: median([one[key] for one in rounds])
        if isinstance(value, dict)
        else statistics.median(one[key] for one in rounds)
        for key, value in rounds[0].items()
    }


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
