"""What the commands on shards cost: listing, `shards make` by processes, `where` by distance.

    python -m benchmarks.shards listing [--entries 27000]
    python -m benchmarks.shards make [--docs FOLDER] [--megabytes 60] [--rounds 3]
    python -m benchmarks.shards where [--docs FOLDER]

Each measured command is a process of its own, as a user starts it; the servers of `listing` run in
this one, on the loopback address. One JSON line a figure. Processor seconds are of the command and
its children.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import corpus, measure
from pipeline import catalog, manifest
from tests.hub import hub_server
from tests.servers import http_server
from tests.stores import store_server

_OPTIONS = {"timeout_s": 30.0, "max_retries": 3}
_FORMS = ("tar.bz2", "jsonl.zst", "parquet")


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_s: float
    memory_mb: float  # most of any one process
    out: str


def command(*arguments: str | Path, **environment: str) -> Cost:
    """Run the program. Raises: RuntimeError: it failed."""
    program = Path(sys.executable).parent / "fineweb-pipeline"
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [program, *map(str, arguments)], env=os.environ | environment, stdout=out, stderr=err
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{arguments} ended with {process.returncode}: {err.read()[-2000:]}")
        return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, out.read())


def say(**figures: Any) -> None:
    """One line of the result."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


# ── listing ─────────────────────────────────────────────────────────────────────────────────


def listing(entries: int) -> None:
    """A listing by glob (hub, store), a question per shard (web, a tenth of them), and the next
    start, which asks for nothing."""
    files = {f"CC-{n % 90:03d}/{n:05d}.parquet": b"x" * 20 for n in range(entries)}
    few = max(1, entries // 10)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "web").mkdir()
        for number in range(few):
            (here / "web" / f"{number:05d}.parquet").write_bytes(b"x")
        with (
            hub_server(here / "cdn", files) as hub,
            store_server("bucket", files) as store,
            http_server(here / "web") as web,
        ):
            places = {
                "hub": ("hf://datasets/owner/name/**/*.parquet",
                        {"HF_ENDPOINT": hub.url, "HF_HOME": folder, "HF_TOKEN": ""}),
                "store": ("gs://bucket/**/*.parquet",
                          {"GOOGLE_BASE_URL": store, "GOOGLE_SKIP_SIGNATURE": "true"}),
                "web": (f"{web}/{{00000..{few - 1:05d}}}.parquet", {}),
            }  # fmt: skip
            nothing = command("--version")
            say(place="nothing: --version", seconds=nothing.seconds, memory_mb=nothing.memory_mb)
            for place, (pattern, environment) in places.items():
                cost = command("shards", "list", pattern, "--json", **environment)
                found = cost.out.count("\n")
                assert found == (few if place == "web" else entries), found
                say(place=place, shards=found, seconds=cost.seconds, cpu_s=cost.cpu_s,
                    memory_mb=cost.memory_mb)  # fmt: skip
                os.environ.update(environment)
                _next_start(place, pattern, here)


def _next_start(place: str, pattern: str, folder: Path) -> None:
    shards = catalog.build([pattern], _OPTIONS)
    manifest.write(folder / catalog.FILE_NAME, catalog.to_entries(shards))
    size = (folder / catalog.FILE_NAME).stat().st_size
    begin = time.monotonic()
    again = catalog.build([pattern], _OPTIONS, catalog.Known(kept=catalog.read_kept(folder)))
    say(place=f"{place}, next start", shards=len(again), seconds=time.monotonic() - begin,
        kept_bytes=size, the_same=[one.key for one in again] == [one.key for one in shards]
        )  # fmt: skip


# ── shards make ─────────────────────────────────────────────────────────────────────────────


def make(docs: Path | None, megabytes: int, rounds: int) -> None:
    """parquet into every form, by one process and by two in turns."""
    with tempfile.TemporaryDirectory() as folder:
        texts = list(corpus.documents(corpus.source_documents(docs), megabytes * 10**6, seed=1))
        corpus.write(Path(folder), texts, 8, "parquet")
        for form in _FORMS:
            seconds: dict[int, list[float]] = {1: [], 2: []}
            cpu: dict[int, list[float]] = {1: [], 2: []}
            made = set()
            for turn in range(2 * rounds):
                processes, out = 1 + turn % 2, Path(folder) / f"{form}-{turn}"
                cost = command(
                    "shards", "make", f"{folder}/parquet", "--out", out, "--format", form,
                    "--shard-size", 2_000_000, "--processes", processes,
                )  # fmt: skip
                seconds[processes].append(cost.seconds)
                cpu[processes].append(cost.cpu_s)
                made.add((out / manifest.FILE_NAME).read_bytes())
            ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
            say(form=form, text_mb=megabytes, one_s=statistics.median(seconds[1]),
                two_s=statistics.median(seconds[2]), faster=statistics.median(ratios),
                one_cpu_s=statistics.median(cpu[1]), two_cpu_s=statistics.median(cpu[2]),
                mb_per_cpu_s=megabytes / statistics.median(cpu[1]), the_same=len(made) == 1
                )  # fmt: skip


# ── where ───────────────────────────────────────────────────────────────────────────────────

_CONFIG = {
    "name": "past",
    "model": {
        "dimensions": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1},
        "attention": {"num_heads": 2, "num_kv_heads": 1},
    },
    "training": {"hyperparameters": {
        "iters": 120, "batch_size": 16, "gradient_accumulation_steps": 4}},
    "data": {"preprocessing": {"max_context_size": 512}, "tokenizer": {"vocab_size": 2000}},
    "logging": {"steps": {"checkpoint_interval": 100}},
}  # fmt: skip


def where(docs: Path | None) -> None:
    """The update right behind a checkpoint, and others further and further from one."""
    with tempfile.TemporaryDirectory() as folder:
        texts = list(corpus.documents(corpus.source_documents(docs), 30 * 10**6, seed=1))
        corpus.write(Path(folder), texts, 8, "jsonl.zst")
        config = Path(folder) / "past.yaml"
        config.write_text(yaml.safe_dump(_CONFIG))
        command("start", "--config", config, "--shards", f"{folder}/jsonl.zst",
                "--runs-dir", folder, "--max-disk", 1, "--plain")  # fmt: skip
        for step in (101, 10, 50, 99):
            cost = command("where", "--run", Path(folder) / "past", "--step", step, "--json")
            answer = json.loads(cost.out)
            assert answer["verified"]
            read = (step - answer["from_step"]) * 16 * 4 * 512
            say(step=step, from_step=answer["from_step"], tokens_read=read, seconds=cost.seconds,
                cpu_s=cost.cpu_s, memory_mb=cost.memory_mb)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("listing", "make", "where"))
    parser.add_argument("--entries", type=int, default=27_000)
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a column text")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(measure.machine(), file=sys.stderr)
    match options.what:
        case "listing":
            listing(options.entries)
        case "make":
            make(options.docs, options.megabytes, options.rounds)
        case "where":
            where(options.docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
