"""Networks that fail and servers that refuse or stall: the fetcher against a real proxy.

Most tests run the fetcher's own code in this process, over a real socket to a real server; whole
runs are at the end.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.messages import (
    ShardFetched,
)
from pipeline.sources import Patience, TransientError
from tests.fetched import DATA, NAME, Fetched, in_seconds
from tests.harness import english, events, finish, job, run, start, write_shards
from tests.proxy import Fault, Request, always, fault_proxy, header, in_turn, simple
from tests.servers import Behaviour, http_server
from tests.test_pipeline import reference

# ── connections that break ──────────────────────────────────────────────────────────────────

HEAD_BYTES = 129
PLACES = [*range(0, 140, 6), 300, 1000, 4095, 4096, 65_537, 99_999, 150_000, 262_144, 300_100]


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("how", ["reset", "close"])
def test_an_answer_cut_at_any_byte_goes_on_behind_it(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int, how: str
) -> None:
    fault = Fault(reset_at=at) if how == "reset" else Fault(close_at=at)
    with fault_proxy(served[0], in_turn(fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert fetched.ok().refetched_bytes == 0
    assert proxy.faults == 1
    first, second = proxy.gets(NAME)
    assert first.start == 0
    assert (second.start > 0) == (at > HEAD_BYTES)
    if how == "close":  # a reset may swallow what was on its way
        assert proxy.sent[NAME] == len(DATA)


@pytest.mark.parametrize("at", [0, 1, 16, 17, 30, 50, 70, 90, 100, 110, 115, 120])
@pytest.mark.parametrize("length", [True, False])
def test_headers_that_are_cut_off_are_not_believed(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int, length: bool
) -> None:
    """A closed connection looks like the end of the headers: half a length is a length."""
    if not length:
        served[1].no_length.add(NAME)
    left = [Fault(close_at=at)] * 2

    def plan(request: Request) -> Fault | None:
        return left.pop() if left else None

    with fault_proxy(served[0], plan) as proxy:
        Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}").ok()
    assert proxy.faults == 2


def test_progress_does_not_count_against_the_retries(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    faults = [Fault(reset_at=20_000)] * 14
    with fault_proxy(served[0], in_turn(*faults)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", max_retries=1)
    fetched.ok()
    assert len(proxy.gets(NAME)) == 15
    assert fetched.logs, "the retries were not logged"


def test_a_byte_now_and_then_is_no_progress(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    """Or a server could hold a run for ever."""
    with fault_proxy(served[0], always(Fault(reset_at=300), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", min_bytes_per_s=1e7)
    fetched.failed("the connection broke (4 attempts without progress)")


def test_bytes_fetched_twice_stay_under_five_percent(tmp_path: Path) -> None:
    """One reset per shard, at a random place."""
    folder = tmp_path / "served"
    folder.mkdir()
    random = np.random.default_rng(2)
    size, number = 2_000_000, 12
    for index in range(number):
        (folder / f"{index}.bin").write_bytes(random.bytes(size))
    with http_server(folder) as url:
        for index in range(number):
            plan = in_turn(Fault(reset_at=int(random.integers(size))))
            with fault_proxy(url, plan) as proxy:
                fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{index}.bin")
                assert isinstance(fetched.answer, ShardFetched)
                assert fetched.path.read_bytes() == (folder / f"{index}.bin").read_bytes()
                assert proxy.faults == 1
                assert proxy.sent[f"{index}.bin"] <= 1.05 * size


def test_without_ranges_it_starts_over(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    served[1].no_ranges = True
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000))) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert 100_000 < fetched.ok().refetched_bytes < 150_000


@pytest.mark.parametrize("said", ["bytes 5-299999/300000", "bytes */300000", "nonsense", None])
def test_ranges_that_lie_are_not_used(
    tmp_path: Path, served: tuple[str, Behaviour, Path], said: str | None
) -> None:
    lie = Fault(head=header("Content-Range", said))
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000), lie)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert fetched.ok().refetched_bytes > 0
    assert [get.start > 0 for get in proxy.gets(NAME)] == [False, True, False]


# ── servers that refuse, and say when ───────────────────────────────────────────────────────


@pytest.mark.parametrize(("status", "asked", "least_s"), [
    ("429 Too Many Requests", "1", 1.0), ("503 Service Unavailable", "date", 1.0),
    ("503 Service Unavailable", "0", 0), ("429 Too Many Requests", "-5", 0), ("429 ", "soon", 0),
    ("429 ", "1e9", 0), ("503 ", "9" * 400 + "x", 0), ("503 ", "", 0),
    ("503 ", "Tue, 99 Nov 2026 99:99:99 GMT", 0),
])  # fmt: skip
def test_retry_after_is_kept_to(
    tmp_path: Path, served: tuple[str, Behaviour, Path], status: str, asked: str, least_s: float
) -> None:
    value = in_seconds(2.2) if asked == "date" else asked
    fault = Fault(answer=simple(status, Retry_After=value))
    with fault_proxy(served[0], in_turn(fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.ok()
    assert least_s <= fetched.seconds < 10


def test_waits_are_bounded() -> None:
    """Five minutes where the server asks for it: the hub counts requests over as long."""
    assert Patience(1).pause_s(TransientError("x", 61.0)) == 61
    assert Patience(1).pause_s(TransientError("x", 1e9)) == 300
    patience = Patience(40)
    assert max(patience.pause_s(TransientError("x")) for _ in range(40)) <= 60
    with pytest.raises(SourceError, match="41 attempts without progress"):
        patience.pause_s(TransientError("x"))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_errors_that_pass_are_waited_out(
    tmp_path: Path, served: tuple[str, Behaviour, Path], status: int
) -> None:
    fault = Fault(answer=simple(f"{status} Later", b"<h1>not now</h1>"))
    with fault_proxy(served[0], in_turn(fault, fault, Fault(close_at=99_999), fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", max_retries=2)
    assert fetched.ok().refetched_bytes == 0


def test_errors_that_stay_are_given_up(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    with fault_proxy(served[0], always(Fault(answer=simple("500 Oops")), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.failed("HTTP 500 (4 attempts without progress)")
    # the first attempt may meet a kept connection that the server is just closing
    assert len(proxy.gets(NAME)) in (3, 4)
    with fault_proxy(served[0], always(Fault(answer=simple("410 Gone")), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.failed("HTTP 410")
    assert len(proxy.gets(NAME)) == 1, "what is final is not tried again"


# ── servers that are slow ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [0, 50, 150_000])
def test_silence_is_given_up_and_the_rest_fetched_elsewhere(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int
) -> None:
    with fault_proxy(served[0], in_turn(Fault(stall_at=at))) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", timeout_s=0.4)
    assert fetched.ok().refetched_bytes == 0
    assert 0.4 <= fetched.seconds < 4
    assert (proxy.gets(NAME)[1].start > 0) == (at > 1000)


def test_a_server_slower_than_the_limit_is_given_up(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    slow = Fault(bytes_per_s=40_000)
    with fault_proxy(served[0], always(slow, "GET")) as proxy:
        limits = {"min_bytes_per_s": 2e5, "timeout_s": 0.4}
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", **limits)
    failed = fetched.failed("slower than 200000 B/s for 0 s (4 attempts without progress)")
    assert "data.stream.min_bytes_per_s" in failed.remedy
    assert fetched.seconds < 10
    starts = [get.start for get in proxy.gets(NAME)]
    assert starts == sorted(starts), "what a slow connection brought is kept"
    with fault_proxy(served[0], in_turn(slow)) as proxy:
        other = Fetched(tmp_path / "other", f"{proxy.url}/{NAME}", **limits)
    assert other.ok().refetched_bytes == 0


def test_waiting_for_a_grant_is_not_slowness(tmp_path: Path) -> None:
    """Only the network's own time counts."""
    from pipeline.workers.fetcher import _Pace

    pace = _Pace("x", {"min_bytes_per_s": 1e3, "timeout_s": 0.05})
    for _ in pace.timed(iter([b"a" * 100] * 5)):
        time.sleep(0.06)
    assert pace.was_enough()


# ── whole runs ──────────────────────────────────────────────────────────────────────────────

DOCUMENTS = english(120)
SHARDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_shards(folder, DOCUMENTS, SHARDS)
    return folder


def test_a_run_through_every_fault_gives_the_same_stream(tmp_path: Path, folder: Path) -> None:
    later = Fault(answer=simple("503 Later", Retry_After="1"))
    faults: dict[int, list[Fault | None]] = {
        0: [Fault(reset_at=20_000), Fault(reset_at=10), None],
        1: [Fault(close_at=9_000), Fault(answer=simple("429 Slow", Retry_After=in_seconds(1)))],
        2: [later, Fault(answer=simple("500 Oops"))],
        3: [Fault(stall_at=5_000)],
        4: [Fault(close_at=7_000), Fault(head=header("Content-Range", "bytes 3-9/10"))],
        5: [Fault(head=header("ETag", '"other"'))],
        6: [Fault(bytes_per_s=5_000), None],
    }
    plans = [in_turn(*some, name=f"shard-{n:05d}.tar.bz2") for n, some in faults.items()]

    def plan(request: Request) -> Fault | None:
        return next((fault for one in plans if (fault := one(request))), None)

    with http_server(folder) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/shard-{{00000..{SHARDS - 1:05d}}}.tar.bz2"]
        one = job(tmp_path, shards, timeout_s=1, fetchers=3, min_bytes_per_s=20_000)
        summary = run(tmp_path, one)
    assert summary["sha256"] == hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()
    assert summary["restarts"] == 0
    assert proxy.faults == 11


@pytest.mark.parametrize(("fault", "code", "what", "remedy"), [
    (Fault(reset_at=0), 5, "the connection broke (2 attempts", "the same command resumes"),
    (Fault(answer=simple("403 Forbidden")), 5, "HTTP 403", "expired"),
    (Fault(head=header("Content-Length", None), close_at=15_000), 3, "damaged or cut off", "again"),
])  # fmt: skip
def test_a_run_that_must_give_up_says_so(
    tmp_path: Path, folder: Path, fault: Fault, code: int, what: str, remedy: str
) -> None:
    def plan(request: Request) -> Fault | None:
        if "00005" not in request.name:
            return None
        if request.method == "HEAD":
            return Fault(head=header("Content-Length", None)) if fault.head else None
        return fault

    shards: list[Any]
    with http_server(folder) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/shard-{{00000..{SHARDS - 1:05d}}}.tar.bz2"]
        begin = time.monotonic()
        process = start(tmp_path, job(tmp_path, shards, timeout_s=1, max_retries=1))
        outcome, err = finish(process)
    assert process.returncode == code, err
    assert "shard-00005.tar.bz2" in outcome["what"]
    assert what in outcome["what"]
    assert remedy in outcome["remedy"]
    assert time.monotonic() - begin < 30
    assert events(err, "stream_ended")
