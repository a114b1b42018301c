"""Several ranges of one shard against a single stream: where they help, and where they do not.

    python -m benchmarks.ranges [--megabytes 384] [--rounds 3] [--json]

A fetcher's own reading, into a file, from a web server in a process of its own on the loopback
address. The server limits each connection, or all together, or nothing; or it makes every request
wait before its first byte. Both ways in turns, the order alternating; every reading of several
ranges begins knowing nothing of the host. Seconds are of the clock: most of them are waiting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure
from pipeline.ranges import Ranges
from pipeline.sources import open_source
from tests.servers import Behaviour, http_server

_NAME = "shard.bin"
_OPTIONS = {"timeout_s": 30.0}


class Place(NamedTuple):
    """How a server is."""

    title: str
    bytes_per_s: float | None
    together: bool = False  # the limit is of all connections
    wait_s: float = 0.0  # before the first byte of an answer


PLACES = (
    Place("20 MB/s a connection", 20e6),
    Place("50 MB/s a connection, 100 ms to the first byte", 50e6, wait_s=0.1),
    Place("30 MB/s for all connections together", 30e6, together=True),
    Place("no limit", None),
)


def _serve(folder: str, place: Place, said: Connection) -> None:
    """Runs in: a process of its own, until the pipe is closed."""
    line = threading.Lock() if place.together else None
    how = Behaviour(
        etag={_NAME: '"one"'}, bytes_per_s=place.bytes_per_s, line=line, wait_s=place.wait_s
    )
    with http_server(Path(folder), how) as url:
        said.send(url)
        said.recv()


@contextmanager
def _server(folder: str, place: Place) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(folder, place, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(20)


def _read(url: str, limit: int, out: Path) -> tuple[float, float, int]:
    """Seconds, CPU seconds, and how many ranges were found to be worth it; 0: it ended before."""
    told: list[dict[str, Any]] = []
    source, ranges = open_source(url, _OPTIONS), Ranges(limit, told.append)
    expected = source.stat()
    begin, cpu, size = time.monotonic(), time.process_time(), 0
    with out.open("wb") as file:
        for piece in ranges.read(source, url, 0, expected).data:
            file.write(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    if size != expected.size_bytes:
        raise RuntimeError(f"{size} bytes came of {expected.size_bytes}")
    worth = int(told[-1]["ranges"]) if told else 0
    return time.monotonic() - begin, time.process_time() - cpu, worth


def compare(place: Place, folder: str, size: int, rounds: int) -> dict[str, Any]:
    """Both ways, in turns."""
    seconds: dict[int, list[float]] = {1: [], 4: []}
    cpu: dict[int, list[float]] = {1: [], 4: []}
    worth = []
    with _server(folder, place) as url:
        for number in range(rounds):
            for limit in (1, 4) if number % 2 else (4, 1):
                took, cpu_s, found = _read(f"{url}/{_NAME}", limit, Path(folder) / "out")
                seconds[limit].append(took)
                cpu[limit].append(cpu_s)
                worth += [found] if limit == 4 else []
    ratios = [one / four for one, four in zip(seconds[1], seconds[4], strict=True)]
    return {
        "server": place.title,
        "one_mb_per_s": round(size / statistics.median(seconds[1]) / 1e6, 1),
        "several_mb_per_s": round(size / statistics.median(seconds[4]) / 1e6, 1),
        "faster": round(statistics.median(ratios), 2),
        "from_to": [round(min(ratios), 2), round(max(ratios), 2)],
        "kept": worth,
        "one_cpu_s": round(statistics.median(cpu[1]), 2),
        "several_cpu_s": round(statistics.median(cpu[4]), 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ranges", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    size, rows = options.megabytes * 10**6, []
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / _NAME).open("wb") as file:
            file.truncate(size)
        for place in PLACES:
            rows.append(compare(place, folder, size, options.rounds))
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        print(measure.machine())
        print(measure.table(
            ["server", "one, MB/s", "several, MB/s", "faster", "kept (0: it ended before)",
             "CPU s, one", "several"],
            [[row["server"], row["one_mb_per_s"], row["several_mb_per_s"],
              f"{row['faster']} ({row['from_to'][0]} to {row['from_to'][1]})",
              ", ".join(map(str, row["kept"])), row["one_cpu_s"], row["several_cpu_s"]]
             for row in rows],
        ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
