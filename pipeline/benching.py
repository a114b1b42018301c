"""Whole runs of the program as a measure: what each stage costs, and how it scales over CPUs.

Runs in: the command line's own process, for `bench` and `plan`, and the benchmarks. Every run is
`fineweb-pipeline tokenize` in processes of its own. `marginal` and `median` are pure.

Costs are marginal: a large run minus a small one on other text, so that start-up and imports
cancel.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import yaml

from pipeline import sample_shards
from pipeline.catalog import Shard
from pipeline.config import Config, Filter, to_plain
from pipeline.costs import Costs, Rest
from pipeline.errors import ConfigError, ExitCode, FinewebError
from pipeline.settings import PREFIX
from pipeline.sizes import usable_cpus

Run = dict[str, Any]
Figures = dict[str, Any]
_ROOM_GB = 4.0  # of the disk, for the shards of a run that is measured
_PARTS = 4  # the small run is so many times smaller
_LEAST_S = 1e-9
_TOKEN_BYTES = 4.3  # of English; only how far a run goes depends on it


class BenchError(FinewebError):
    """A run that was to be measured has failed, with its own code."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what, "run it by itself: fineweb-pipeline tokenize with the same options")
        known = exit_code in list(ExitCode)
        self.exit_code = ExitCode(exit_code) if known else ExitCode.BUG


# ── runs ────────────────────────────────────────────────────────────────────────────────────


def program(*arguments: str | Path) -> Run:
    """Run `fineweb-pipeline … --json --plain` as a user does; its JSON result.

    Raises:
        BenchError: it failed; with the end of what it wrote.
    """
    return command(*arguments, "--plain")


def command(*arguments: str | Path) -> Run:
    """The same for a command that shows no run."""
    begin = [sys.executable, "-c", "from pipeline.cli import main; main()"]
    return json_of([*begin, *map(str, arguments), "--json"])


def json_of(line: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """The JSON object in the last line that a command prints; Ctrl-C ends it, too.

    The user's settings for other commands are not for it: what counts stands in its arguments.

    Raises:
        BenchError: it failed, or printed nothing.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=kept | dict(environment or {}), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, said = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its workers end with their sockets
            raise
    if process.returncode or not out.strip():
        end = (said or out).strip().splitlines()[-3:]
        raise BenchError(f"a run that was to be measured failed: {' '.join(end)}",
                         process.returncode)  # fmt: skip
    result: Run = json.loads(out.splitlines()[-1])
    return result


def tokenize(shards: Sequence[str | Path], workers: int | str, *more: str) -> Run:
    """`tokenize` into a folder that is deleted again."""
    arguments = [part for shard in shards for part in ("--shards", str(shard))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens"
        return program("tokenize", *arguments, "--out", out, "--workers", str(workers), *more)


def tokenize_config(config: Config, workers: int | str, limit_tokens: int | None) -> Run:
    """The same with the shards and everything else of a configuration, into a folder that is
    deleted again."""
    folder = Path(tempfile.mkdtemp())
    try:
        stream = msgspec.structs.replace(
            config.data.stream, cache_dir=None, mix={}, max_disk_gb=_ROOM_GB
        )
        data = msgspec.structs.replace(config.data, stream=stream)
        logging = msgspec.structs.replace(config.logging, http_port=None)
        plain = to_plain(msgspec.structs.replace(config, data=data, logging=logging))
        file = folder / "config.yaml"  # the folder is the user's alone: URLs may hold secrets
        file.write_text(yaml.safe_dump(plain))
        more = () if limit_tokens is None else ("--limit-tokens", str(limit_tokens))
        return program(
            "tokenize", "--config", file, "--out", folder / "out", "--workers", str(workers), *more
        )
    finally:
        shutil.rmtree(folder)


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


def worker_counts(most: int | None = None) -> list[int]:
    """1, 2, 4 … and all CPUs."""
    most = most or usable_cpus()
    return sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})


# ── costs ───────────────────────────────────────────────────────────────────────────────────


def marginal(large: Run, small: Run) -> Figures:
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
    wall = max(_LEAST_S, large["wall_s"] - small["wall_s"])
    figures: Figures = {
        "tokens_per_s": tokens / wall,
        "cpu_s_per_mtok": 1e6 * (large["cpu_s"] - small["cpu_s"]) / tokens,
    }
    if "text_bytes" in large:
        figures["mb_per_s"] = (large["text_bytes"] - small["text_bytes"]) / wall / 1e6
    if "cpu_s_by_stage" in large:
        before = small["cpu_s_by_stage"]
        figures["stages"] = {
            stage: 1e6 * (seconds - before.get(stage, 0.0)) / tokens
            for stage, seconds in large["cpu_s_by_stage"].items()
        }
    if "peak_rss_bytes" in large:
        figures["memory_gb"] = large["peak_rss_bytes"] / 1e9
    return figures


def median(rounds: Sequence[Figures]) -> Figures:
    """Of each figure over the rounds, also inside dictionaries of figures."""
    return {
        key: median([one[key] for one in rounds])
        if isinstance(value, dict)
        else statistics.median(one[key] for one in rounds)
        for key, value in rounds[0].items()
    }


def costs_of(large: Run, small: Run, text_per_shard_byte: float, on: str) -> Costs:
    """What two runs say, by megabyte of text. A run that was stopped has worked on text whose
    tokens were not written any more: it counts for all stages but the writer.

    Args:
        large: A run.
        small: A smaller one.
        text_per_shard_byte: Bytes of text in a byte of shard.
        on: What was read.

    Raises:
        ValueError: the large run is not larger.
    """
    text_mb = (large["text_bytes"] - small["text_bytes"]) / 1e6
    tokens = large["tokens"] - small["tokens"]
    spent = {
        stage: max(_LEAST_S, seconds - small["cpu_s_by_stage"].get(stage, 0.0))
        for stage, seconds in large["cpu_s_by_stage"].items()
    }
    if min(text_mb, tokens, spent["decompressor"], spent["tokenizer"]) <= _LEAST_S:
        raise ValueError(f"{large['tokens']:,} tokens cost no more than {small['tokens']:,}")
    tokens_per_mb = 1e6 * large["stream_tokens"] / large["text_bytes"]
    rate = tokens / max(_LEAST_S, large["wall_s"] - small["wall_s"])
    rest = Rest(
        fetch_s=spent.get("fetcher", _LEAST_S) / text_mb * text_per_shard_byte,
        write_s=spent["writer"] / tokens * tokens_per_mb,
        supervise_s=spent["supervisor"] / text_mb,
        tokens_per_mb=tokens_per_mb,
        text_per_shard_byte=text_per_shard_byte,
        start_s=max(0.0, small["wall_s"] - small["tokens"] / rate),
        process_bytes=small["peak_rss_bytes"] // small["processes"],
        measured_on=on,
    )
    return Costs(spent["decompressor"] / text_mb, spent["tokenizer"] / text_mb, rest)


# ── what is measured ────────────────────────────────────────────────────────────────────────


class Subject(msgspec.Struct, frozen=True):
    """Shards to run on."""

    large: Config
    small: Config
    tokens: int | None  # that a large run takes at most; None: all
    shard_bytes: int  # of all of its shards
    form: str
    said: str


def built_in(config: Config, folder: Path, form: str, megabytes: float) -> Subject:
    """Shards of the built-in corpus, in one format, for both sizes.

    Args:
        config: The user's, whose shards are not looked at.
        folder: Where they are made.
        form: tar.bz2, jsonl.zst, parquet …
        megabytes: Text of the large run.
    """
    sides, size = [], 0
    for parts, seed in ((1, 1), (_PARTS, 2)):
        texts = list(sample_shards.long_texts(int(megabytes * 1e6) // parts, seed))
        paths = sample_shards.write(folder / f"{parts}", texts, 4, form)
        size = size or sum(path.stat().st_size for path in paths)
        sides.append(_plain(config, [str(path) for path in paths]))
    return Subject(sides[0], sides[1], None, size, form, f"the built-in corpus as {form}")


def users(config: Config, shards: Sequence[Shard], megabytes: float) -> Subject:
    """The user's own shards, as far as the first megabytes of text."""
    stream = msgspec.structs.replace(
        config.data.stream, lanes=1, shuffle=False, epochs=1, shards=config.data.stream.patterns()
    )
    data = msgspec.structs.replace(config.data, stream=stream)
    one = msgspec.structs.replace(config, data=data)
    size = sum(shard.size_bytes or 0 for shard in shards)
    form = sample_shards.form_of(shards[0].name)
    return Subject(one, one, int(megabytes * 1e6 / _TOKEN_BYTES), size, form, "your shards")


def _plain(config: Config, paths: list[str]) -> Config:
    """The configuration with these shards, and nothing that was meant for others."""
    stream = msgspec.structs.replace(
        config.data.stream, shards=paths, manifest=None, lanes=1, shuffle=False, epochs=1,
        text_field=sample_shards.FIELD,
    )  # fmt: skip
    data = msgspec.structs.replace(config.data, stream=stream, filter=Filter())
    return msgspec.structs.replace(config, data=data)


def measure(subject: Subject, workers: int | str) -> tuple[Figures, Costs]:
    """Both runs with so many workers.

    Raises:
        BenchError: one has failed.
        ConfigError: the shards hold too little.
    """
    large = tokenize_config(subject.large, workers, subject.tokens)
    limited = subject.tokens is not None and large["tokens"] >= subject.tokens
    part = None if subject.tokens is None else max(1, large["tokens"] // _PARTS)
    small = tokenize_config(subject.small, workers, part)
    whole = subject.shard_bytes and not limited
    ratio = large["text_bytes"] / subject.shard_bytes if whole else usual_ratio(subject.form)
    try:
        return marginal(large, small), costs_of(large, small, ratio, subject.said)
    except ValueError as error:
        raise ConfigError(
            f"the shards are too small to be measured: {error}",
            "give more or larger ones, or no --shards: then the built-in corpus is measured",
        ) from None


def usual_ratio(form: str) -> float:
    """Bytes of English text in a byte of such shards."""
    texts = sample_shards.short_texts()
    return sum(len(text.encode()) for text in texts) / len(sample_shards.shard(form, texts))


def sweep(
    subject: Subject, counts: Sequence[int], rounds: int, said: Callable[[str], None]
) -> tuple[dict[int, Figures], Costs]:
    """Every number of workers, on as many CPUs, in turns; medians.

    Args:
        subject: What is read.
        counts: Numbers of tokenizers.
        rounds: How often each.
        said: Told of every run that begins.

    Returns:
        Figures by number of workers, and the costs with the most of them.
    """
    found: dict[int, list[Figures]] = {count: [] for count in counts}
    costs: list[Costs] = []
    for number in range(rounds):
        for count in counts:
            said(f"round {number + 1} of {rounds}: {count} workers on {count} CPUs")
            with pinned(count):
                figures, cost = measure(subject, count)
            found[count].append(figures)
            if count == max(counts):
                costs.append(cost)
    middle = sorted(costs, key=lambda one: one.read_s + one.encode_s)[len(costs) // 2]
    return {count: median(rounds) for count, rounds in found.items()}, middle
