"""Several ranges of one shard: where they help, where they do not, and what they must not break."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
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
# A trial's sizes, a fraction of those in production.
SMALL = {"PIECE_BYTES": 120_000, "LARGE_BYTES": 600_000}
FASTER = (1e6, 2e6, 4e6)  # bytes/s of one, two and four ranges
_MEASURED_BYTES = 200_000


def measured(rates: Iterable[float]) -> type:
    """A meter that finds these rates, one after the other: how busy this machine is must not
    decide what is tested (that several are faster in truth: benchmarks/ranges.py)."""
    left = iter(rates)

    class Measured:
        def __init__(self) -> None:
            self.rate, self._rate = 0.0, next(left, 0.0)
            self._begin: int | None = None

        def at(self, num_bytes: int) -> None:
            self._begin = num_bytes if self._begin is None else self._begin
            if num_bytes - self._begin >= _MEASURED_BYTES:
                self.rate = self._rate

    return Measured


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, short_waits: None) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(ranges, name, value)
    monkeypatch.setattr(ranges, "_Meter", measured(FASTER))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Behaviour]]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(DATA)
    how = Behaviour(etag={NAME: '"one"'})
    with http_server(tmp_path / "served", how) as url:
        yield url, how


def fetch(tmp_path: Path, url: str, **options: float) -> Fetched:
    return Fetched(tmp_path / "cache", f"{url}/{NAME}", **SEVERAL | options)


def whole(fetched: Fetched) -> bool:
    return fetched.path.is_file() and fetched.path.read_bytes() == DATA


def found(fetched: Fetched) -> list[object]:
    """How many ranges were found to be worth it, each time it was asked."""
    return [log.fields["ranges"] for log in fetched.logs if log.event == "ranges_measured"]


def test_a_slow_stream_becomes_four(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    url, how = server
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert found(fetched) == [4]
    assert how.requests[NAME] > 8, "pieces"
    assert fetched.done().refetched_bytes == 0


def test_what_a_host_is_worth_is_remembered(server: tuple[str, Behaviour]) -> None:
    """The next shard begins with as many, without a trial; a limit of one is obeyed."""
    url, how = server
    stat = Stat(len(DATA), '"one"')
    told: list[dict[str, object]] = []
    several, single = Ranges(4, told.append), Ranges(1, told.append)
    address = f"{url}/{NAME}"
    for reader, ranged in ((several, True), (several, True), (single, False)):
        how.requests.clear()
        assert b"".join(reader.read(open_source(address, OPTIONS), address, 0, stat).data) == DATA
        assert (how.requests[NAME] > 8) == ranged
    assert len(told) == 1


@pytest.mark.parametrize(("rates", "kept"), [
    ((1e6, 1.2e6), 1), ((1e6, 2e6, 2.5e6), 2), ((1e6, 1.31e6, 1.71e6), 4), ((99e6, 120e6), 1),
])  # fmt: skip
def test_more_are_kept_only_if_all_together_are_faster(
    tmp_path: Path, server: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch,
    rates: tuple[float, ...], kept: int,
) -> None:  # fmt: skip
    """By 1.3 times; what was fetched for a trial is not fetched again."""
    url, how = server
    monkeypatch.setattr(ranges, "_Meter", measured(rates))
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert found(fetched) == [kept]
    assert fetched.done().refetched_bytes == 0
    if kept == 1:
        assert how.requests[NAME] < 12, "one stream for the rest"


def test_a_fast_stream_is_left_alone(
    tmp_path: Path, server: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_Meter", measured([101e6]))
    url, how = server
    fetched = fetch(tmp_path, url)
    assert whole(fetched)
    assert (found(fetched), how.requests[NAME]) == ([], 1)


@pytest.mark.parametrize("change", ["no ETag", "weak ETag", "no length", "small"])
def test_what_does_not_qualify_is_one_request(
    tmp_path: Path, server: tuple[str, Behaviour], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, how = server
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
    tmp_path: Path, server: tuple[str, Behaviour], how_not: str
) -> None:
    """Nothing is lost and nothing fails: the stream that is open goes on."""
    url, how = server
    how.no_ranges = how_not == "no ranges"

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
    tmp_path: Path, server: tuple[str, Behaviour]
) -> None:
    url, _ = server
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
    tmp_path: Path, server: tuple[str, Behaviour]
) -> None:
    url, how = server
    gets = iter(range(1000))

    def plan(request: Request) -> Fault | None:
        if request.method == "GET" and next(gets) == 9:
            how.etag[NAME] = '"two"'
        return None

    with fault_proxy(url, plan) as proxy:
        fetched = fetch(tmp_path, proxy.url)
    fetched.failed("is another version now")


def test_a_kill_in_the_middle_leaves_a_beginning_that_is_gone_on_from(
    tmp_path: Path, server: tuple[str, Behaviour]
) -> None:
    """kill -9 of a process that has several ranges open."""
    url, how = server
    lines = (
        "from pathlib import Path",
        "from pipeline import faults, ranges, sources",
        f"for name, value in {SMALL!r}.items(): setattr(ranges, name, value)",
        "from tests.fetched import Fetched",
        "from tests.test_ranges import FASTER, measured",
        "ranges._Meter = measured(FASTER)",
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
    rng = random.Random(seed)
    source, got, told = _Memory(rng), b"", []
    rates = (rng.choice((1e6, 1.5e6, 3e6)) for _ in range(10_000))
    monkeypatch.setattr(ranges, "_Meter", measured(rates))
    several = Ranges(4, told.append)
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


def test_a_rate_is_measured_when_it_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the meter itself
    now = [100.0]
    monkeypatch.setattr(ranges.time, "monotonic", lambda: now[0])
    meter = ranges._Meter()
    said = []
    for tenth in range(1, 31):  # slow for half a second, then 8 MB/s
        now[0] = 100 + tenth / 10
        meter.at(tenth if tenth < 6 else (tenth - 5) * 800_000)
        said.append(meter.rate)
    assert said[: said.index(meter.rate)] == [0.0] * said.index(meter.rate)
    assert meter.rate == pytest.approx(8e6)
