"""Memory of the whole pipeline without the trainer over a long run, and whether it stays flat.

    python -m benchmarks.memory [--docs FOLDER] [--gigabytes 20] [--max-disk 0.5]

`tokenize` at default settings with `start`'s 8 lanes and 2 tokenizers, over shards that a server
of its own makes on the fly (benchmarks/endless.py says what repeats), so that they are really
fetched, and evicted under a small budget. Every second the proportional set size (PSS: shared
pages counted once) of the supervisor and all its children is taken. Token files that are whole
are deleted meanwhile, so that the disk does not fill; the tokens are counted.

The picture is benchmarks/pictures/memory.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import endless, measure, pictures

_EVERY_S = 1.0
_SAY_EVERY_S = 30.0
_GOAL_BYTES = 1 << 30
_TENTH = 10


@contextmanager
def server(docs: Path | None) -> Iterator[str]:
    """The endless shards; yields their URL."""
    command = [sys.executable, "-m", "benchmarks.endless"]
    if docs is not None:
        command += ["--docs", str(docs)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=measure.ROOT
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def sample(supervisor: psutil.Process) -> dict[str, int]:
    """PSS by role, in bytes; processes that are just starting or ending are left out."""
    found: dict[str, int] = {}
    for process in (supervisor, *supervisor.children(recursive=True)):
        try:
            size, name = process.memory_full_info().pss, measure.role(process)
        except psutil.Error:
            continue
        found[name] = found.get(name, 0) + size
    return found


class Files:
    """The run's token files: counted, and deleted once they are whole."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._deleted = folder, 0

    def tokens(self) -> int:
        """Written so far."""
        for path in self._folder.glob("tokens_*.bin"):
            self._deleted += path.stat().st_size // 2
            path.unlink()
        partial = sum(path.stat().st_size for path in self._folder.glob("tokens_*.bin.partial"))
        return self._deleted + partial // 2


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Samples over one run, and its own summary."""
    last = -(-int(args.gigabytes * 1e9) // endless.SHARD_BYTES) - 1
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, server(args.docs) as url:
        out = Path(scratch) / "tokens"
        shards = f"{url}/shard-{{000000..{last:06d}}}.jsonl.zst"
        command = [Path(sys.executable).parent / "fineweb-pipeline", "tokenize", "--shards", shards]
        command += ["--out", out, "--workers", "2", "--lanes", "8", "--json", "--plain"]
        command += ["--max-disk", str(args.max_disk)]
        begin, said, files = time.monotonic(), 0.0, Files(out)
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        supervisor = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.monotonic() - begin
            one = {"s": round(now, 1), "tokens": files.tokens(), "pss_bytes": sample(supervisor)}
            if sum(one["pss_bytes"].values()):
                samples.append(one)
            if now - said >= _SAY_EVERY_S and samples:
                said = now
                total = sum(samples[-1]["pss_bytes"].values()) / 2**30
                print(f"{now:5.0f} s  {one['tokens']:>13,} tokens  {total:.3f} GiB", flush=True)
            time.sleep(_EVERY_S)
        assert process.stdout is not None
        written = process.stdout.read()
        if process.returncode:
            raise SystemExit(f"the run ended with exit code {process.returncode}\n{written}")
    return {"machine": measure.machine(), "samples": samples, **json.loads(written)}


def totals(samples: list[dict[str, Any]]) -> list[int]:
    """PSS of all processes, in bytes, while tokens flow and every role is there."""
    roles = set().union(*(one["pss_bytes"] for one in samples))
    return [
        sum(one["pss_bytes"].values())
        for one in samples
        if one["tokens"] and one["pss_bytes"].keys() == roles
    ]


def report(result: dict[str, Any]) -> None:
    """First, last, largest, and the growth between the second and the last tenth."""
    series = totals(result["samples"])
    tenth = max(1, len(series) // _TENTH)
    early = statistics.median(series[tenth : 2 * tenth] or series)
    late = statistics.median(series[-tenth:])
    print(f"\n{result['machine']}\n")
    rows = [
        ["text", f"{result['text_bytes'] / 1e9:.2f} GB in {result['shards']} shards"],
        ["fetched, evicted", f"{result['fetched_shards']}, {result['evicted_shards']}"],
        ["largest disk use", f"{result['peak_disk_bytes'] / 1e9:.3f} GB"],
        ["tokens/s", f"{result['tokens'] / result['wall_s']:,.0f}"],
        ["PSS, first sample", f"{series[0] / 2**30:.3f} GiB"],
        ["PSS, last sample", f"{series[-1] / 2**30:.3f} GiB"],
        ["PSS, largest", f"{max(series) / 2**30:.3f} GiB (goal below {_GOAL_BYTES / 2**30:.1f})"],
        ["median of the second tenth", f"{early / 2**30:.3f} GiB"],
        ["median of the last tenth", f"{late / 2**30:.3f} GiB ({100 * (late / early - 1):+.1f} %)"],
    ]
    print(measure.table(["what", "how much"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of text")
    parser.add_argument("--max-disk", type=float, default=0.5, metavar="GB")
    result = run(parser.parse_args())
    report(result)
    measure.save("memory", result)
    pictures.draw("memory", result)


if __name__ == "__main__":
    main()
