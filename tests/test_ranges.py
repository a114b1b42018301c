"""Several ranges of one shard: where they help, where they do not, and what they must not break."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import ranges
from pipeline.ranges import Ranges
from pipeline.sources import Chunks, Stat, TransientError, open_source
from tests.fetched import NAME, OPTIONS, Fetched
from tests.harness import ROOT
from tests.proxy import Fault, Request, fault_proxy, simple
from tests.servers import Behaviour, http_server

DATA = np.random.default_rng(2).bytes(2_500_000)
SEVERAL = {"max_ranges": 4}
# A trial's sizes and times, a fraction of those in production.
SMALL = {"PIECE_BYTES": 120_000, "LARGE_BYTES": 600_000, "SETTLE_S": 0.03, "MEASURE_S": 0.2}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, short_waits: None) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(ranges, name, value)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[str, Behaviour]]:
    """A server that gives each connection 1 MB/s."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(DATA)
    how = Behaviour(etag={NAME: '"one"'}, bytes_per_s=1e6)
    with http_server(tmp_path / "served", how) as url:
        yield url, how


def fetch(tmp_path: Path, url: str, **options: float) -> Fetched:
    return Fetched(tmp_path / "cache", f"{url}/{NAME}", **SEVERAL | options)


def whole(fetched: Fetched) -> bool:
    return fetched.path.is_file() and fetched.path.read_bytes() == DATA


def found(fetched: Fetched) -> list[object]:
    """How many ranges were found to be worth it, each time it was asked."""
    return [log.fields["ranges"] for log in fetched.logs if log.event == "ranges_measured"]


def test_a_slow_stream_becomes_several(tmp_path: Path, slow: tuple[str, Behaviour]) -> None:
    url, how = slow
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert found(fetched) in ([2], [4])
    assert how.requests[NAME] > 8, "pieces"
    assert fetched.done().refetched_bytes == 0


def test_what_a_host_is_worth_is_remembered(slow: tuple[str, Behaviour]) -> None:
    """The next shard begins with as many, without a trial; a limit of one is obeyed."""
    url, how = slow
    stat = Stat(len(DATA), '"one"')
    told: list[dict[str, object]] = []
    several, single = Ranges(4, told.append), Ranges(1, told.append)
    address = f"{url}/{NAME}"
    for reader, ranged in ((several, True), (several, True), (single, False)):
        how.requests.clear()
        assert b"".join(reader.read(open_source(address, OPTIONS), address, 0, stat).data) == DATA
        assert (how.requests[NAME] > 8) == ranged
        how.bytes_per_s = None
    assert len(told) == 1


def test_where_the_line_is_the_limit_one_stream_stays(
    tmp_path: Path, slow: tuple[str, Behaviour]
) -> None:
    url, how = slow
    how.line, how.bytes_per_s = threading.Lock(), 3e6
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert found(fetched) == [1]
    assert how.requests[NAME] < 15
    assert how.sent[NAME] < 1.3 * len(DATA)


def test_a_fast_stream_is_left_alone(
    tmp_path: Path, slow: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FAST_BYTES_PER_S", 1e5)
    url, how = slow
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert (found(fetched), how.requests[NAME]) == ([], 1)


@pytest.mark.parametrize("change", ["no ETag", "weak ETag", "no length", "small"])
def test_what_does_not_qualify_is_one_request(
    tmp_path: Path, slow: tuple[str, Behaviour], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, how = slow
    how.bytes_per_s = 6e6
    match change:
        case "no length":
            how.no_length.add(NAME)
        case "small":
            monkeypatch.setattr(ranges, "LARGE_BYTES", len(DATA) + 1)
        case _:
            how.etag[NAME] = "" if change == "no ETag" else 'W/"one"'
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert (found(fetched), how.requests[NAME]) == ([], 1)


@pytest.mark.parametrize("how_not", ["no ranges", "403 Forbidden", "503 Busy", "reset"])
def test_a_server_that_gives_no_second_range_keeps_its_first(
    tmp_path: Path, slow: tuple[str, Behaviour], how_not: str
) -> None:
    """Nothing is lost and nothing fails: the stream that is open goes on."""
    url, how = slow
    how.no_ranges, how.bytes_per_s = how_not == "no ranges", 6e6

    def plan(request: Request) -> Fault | None:
        if how.no_ranges or "range" not in request.headers:
            return None
        return Fault(reset_at=9) if how_not == "reset" else Fault(answer=simple(how_not))

    with fault_proxy(url, plan) as proxy:
        fetched = fetch(tmp_path, proxy.url)
    assert whole(fetched)
    assert found(fetched) == [1]
    assert fetched.done().refetched_bytes == 0
    assert sum("range" not in one.headers for one in proxy.gets(NAME)) == 1


def test_a_piece_that_fails_is_fetched_again_by_one_stream(
    tmp_path: Path, slow: tuple[str, Behaviour]
) -> None:
    url, _ = slow
    gets = iter(range(1000))

    def plan(request: Request) -> Fault | None:
        return Fault(reset_at=9_000) if request.method == "GET" and next(gets) == 9 else None

    with fault_proxy(url, plan) as proxy:
        fetched = fetch(tmp_path, proxy.url)
    assert proxy.faults == 1
    assert whole(fetched)
    assert found(fetched)[-1] == 1
    assert fetched.done().refetched_bytes < 6 * SMALL["PIECE_BYTES"]


def test_another_version_in_the_middle_is_noticed(
    tmp_path: Path, slow: tuple[str, Behaviour]
) -> None:
    url, how = slow
    gets = iter(range(1000))

    def plan(request: Request) -> Fault | None:
        if request.method == "GET" and next(gets) == 9:
            how.etag[NAME] = '"two"'
        return None

    with fault_proxy(url, plan) as proxy:
        fetched = fetch(tmp_path, proxy.url)
    fetched.failed("is another version now")


def test_a_kill_in_the_middle_leaves_a_beginning_that_is_gone_on_from(
    tmp_path: Path, slow: tuple[str, Behaviour]
) -> None:
    """kill -9 of a process that has several ranges open."""
    url, how = slow
    lines = (
        "from pathlib import Path",
        "from pipeline import faults, ranges, sources",
        f"for name, value in {SMALL!r}.items(): setattr(ranges, name, value)",
        "from tests.fetched import Fetched",
        "import os, signal",
        "from pipeline.workers import fetcher",
        "calls = iter(range(10_000))",
        "def stop(point):",
        f"    if (part := next(Path({str(tmp_path / 'cache')!r}).glob('*.partial'))) and "
        f"part.stat().st_size > {len(DATA) * 2 // 3}: os.kill(os.getpid(), signal.SIGKILL)",
        "fetcher.faultpoint = stop",
        f"Fetched(Path({str(tmp_path / 'cache')!r}), {f'{url}/{NAME}'!r}, max_ranges=4)",
    )
    (tmp_path / "cache").mkdir()
    killed = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, timeout=60,
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (partial,) = (tmp_path / "cache").glob("*.partial")
    have = partial.read_bytes()
    assert len(DATA) // 2 < len(have) < len(DATA)
    assert have == DATA[: len(have)], "the beginning, and nothing else"
    assert how.requests[NAME] > 5, "several ranges were open"
    how.starts.clear()
    assert whole(fetch(tmp_path, url))
    assert min(how.starts) == len(have)


class _Memory:
    """A source whose answers come in odd pieces, and break now and then."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def stat(self) -> Stat:
        return Stat(len(DATA), '"one"')

    def read(self, start: int, expected: Stat, end: int | None = None) -> Chunks:
        return Chunks(start, self._pieces(start, len(DATA) if end is None else end))

    def _pieces(self, at: int, end: int) -> Iterator[bytes]:
        while at < end:
            size = self._rng.randint(1, 30_000)
            yield DATA[at : min(end, at + size)]
            at += size
            if self._rng.random() < 0.02:
                raise TransientError("broken")


@pytest.mark.parametrize("seed", range(12))
def test_bytes_come_in_order_whatever_breaks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "REMEMBER_S", 0.01)
    monkeypatch.setattr(ranges, "FAST_BYTES_PER_S", float("inf"))
    for name in ("SETTLE_S", "MEASURE_S"):
        monkeypatch.setattr(ranges, name, 0.0)
    source, got, told = _Memory(random.Random(seed)), b"", []
    several, kinds = Ranges(4, told.append), seed % 2
    monkeypatch.setattr(ranges, "_WORTH", 0.0 if kinds else 9.0)  # all is kept, or nothing
    while len(got) < len(DATA):
        try:
            for piece in several.read(source, "http://host/x", len(got), source.stat()).data:
                got += piece
        except TransientError:
            continue
    assert got == DATA
    assert told


def test_the_hub_is_asked_for_one_range_only() -> None:
    for url in ("hf://datasets/o/n/x", "https://huggingface.co/x", "https://cdn-lfs.hf.co/x",
                "https://user:pass@huggingface.co/x", "file:///x"):  # fmt: skip
        assert ranges._host(url) is None
    assert ranges._host("https://user:secret@nothuggingface.co/x") == "https://nothuggingface.co"
    assert ranges._host("s3://bucket/a/b") == "s3://bucket"
