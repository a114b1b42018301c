"""Whole runs against real servers: the byte budget, broken servers, broken shards."""

from __future__ import annotations

import bz2
import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.harness import (
    DiskWatcher,
    english,
    events,
    finish,
    job,
    run,
    start,
    write_shards,
)
from tests.servers import Behaviour, http_server, s3_server
from tests.test_pipeline import reference

DOCUMENTS = english(200)
SHARDS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    write_shards(folder, DOCUMENTS, SHARDS, "tar.bz2")
    return folder


@pytest.fixture(scope="module")
def expected() -> str:
    return hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()


def pattern(url: str) -> str:
    return f"{url}/shard-{{00000..{SHARDS - 1:05d}}}.tar.bz2"


def test_http_gives_the_same_stream(tmp_path: Path, folder: Path, expected: str) -> None:
    with http_server(folder) as url:
        summary = run(tmp_path, job(tmp_path, [pattern(url)], fetchers=2))
    assert summary["sha256"] == expected
    assert summary["fetched_shards"] == summary["evicted_shards"] == SHARDS
    assert not list((tmp_path / "cache").glob("*.shard"))


def test_s3_gives_the_same_stream_and_no_log_holds_the_keys(
    tmp_path: Path, folder: Path, expected: str
) -> None:
    objects = {f"fineweb/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with s3_server("bucket", objects) as variables:
        summary = run(tmp_path, job(tmp_path, [pattern("s3://bucket/fineweb")]), **variables)
        process = start(tmp_path, job(tmp_path / "no", ["s3://bucket/none.tar"]), **variables)
        outcome, _ = finish(process)
    assert summary["sha256"] == expected
    assert process.returncode == 5
    assert "s3://bucket/none.tar does not exist" in outcome["what"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"that-is-secret" not in path.read_bytes()


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_budget_holds_to_the_byte(
    tmp_path: Path, folder: Path, expected: str, lanes: int
) -> None:
    """1.2 × what the run cannot do without, four fetchers, some lengths unknown; watched from
    outside every few milliseconds."""
    largest = max(path.stat().st_size for path in folder.iterdir())
    fixed = 500_000 + (1 << 18)  # logs and small files
    # shards of unknown length are granted in steps of 16 MiB: leave them out of this limit
    budget = int(1.2 * (largest * lanes + fixed))
    with http_server(folder, Behaviour(bytes_per_s=2e6)) as url:
        one = job(
            tmp_path, [pattern(url)], lanes=lanes, fetchers=4, prefetch=4, max_disk_gb=budget / 1e9
        )
        with DiskWatcher(tmp_path / "cache") as watcher:
            summary = run(tmp_path, one)
    logs = sum(
        path.stat().st_size for path in (tmp_path / "run").glob("*") if "tokens" not in path.name
    )
    assert watcher.samples > 100
    assert 0 < watcher.peak_bytes + logs <= budget
    assert 0 < summary["peak_disk_bytes"] <= budget
    if lanes == 1:
        assert summary["sha256"] == expected


def test_shards_of_unknown_length_stay_inside_the_budget(
    tmp_path: Path, folder: Path, expected: str
) -> None:
    some = {f"shard-{number:05d}.tar.bz2" for number in range(0, SHARDS, 2)}
    budget = 40_000_000  # two grants and logs
    with http_server(folder, Behaviour(no_length=some)) as url:
        one = job(tmp_path, [pattern(url)], fetchers=4, prefetch=4, max_disk_gb=budget / 1e9)
        with DiskWatcher(tmp_path / "cache") as watcher:
            summary = run(tmp_path, one)
    assert summary["sha256"] == expected
    assert watcher.peak_bytes <= summary["peak_disk_bytes"] <= budget


def test_a_shard_of_unknown_length_that_outgrows_the_budget_is_named(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "big.jsonl").write_bytes(b'{"text": "' + b"a" * 40_000_000 + b'"}\n')
    with http_server(tmp_path / "big", Behaviour(no_length={"*"})) as url:
        process = start(tmp_path, job(tmp_path, [f"{url}/big.jsonl"], max_disk_gb=0.03))
        with DiskWatcher(tmp_path / "cache") as watcher:
            outcome, err = finish(process)
    assert process.returncode == 4, err
    assert "big.jsonl is longer than" in outcome["what"]
    assert watcher.peak_bytes <= 30_000_000


def test_a_budget_that_is_too_small_is_refused_with_the_one_that_works(
    tmp_path: Path, folder: Path
) -> None:
    largest = max(path.stat().st_size for path in folder.iterdir())
    with http_server(folder) as url:
        small = job(tmp_path, [pattern(url)], lanes=4, max_disk_gb=4 * largest / 1e9)
        process = start(tmp_path, small)
        outcome, _ = finish(process)
        assert process.returncode == 4
        assert "too small" in outcome["what"]
        enough = float(outcome["remedy"].split()[2])
        run(tmp_path, job(tmp_path, [pattern(url)], lanes=4, max_disk_gb=enough))


FETCHER_KILLS = [
    ("fetcher:mid_write", 2),
    ("fetcher:before_rename", 3),
    ("fetcher:after_rename", 2),
    ("before_send:ShardFetched", 1),
    ("after_send:ShardFetched", 2),
    ("received:Fetch", 3),
    ("mid_send:FetchProgress", 1),
]


@pytest.mark.parametrize(("point", "count"), FETCHER_KILLS)
def test_a_killed_fetcher_changes_nothing(
    tmp_path: Path, folder: Path, expected: str, point: str, count: int
) -> None:
    latch = tmp_path / "fired"
    with http_server(folder, Behaviour(bytes_per_s=1e6)) as url:
        summary = run(
            tmp_path,
            job(tmp_path, [pattern(url)], fetchers=2),
            FINEWEB_FAULT=f"kill:fetcher:{point}:{count}:{latch}",
        )
    assert latch.exists(), "the kill did not happen"
    assert summary["sha256"] == expected
    assert summary["restarts"] == 1


def test_servers_that_fail_for_a_while_are_tried_again(
    tmp_path: Path, folder: Path, expected: str
) -> None:
    how = Behaviour(
        status={"shard-00001.tar.bz2": [503, 429], "shard-00002.tar.bz2": [500]},
        cut_after={"shard-00003.tar.bz2": 20_000},
        no_head=True,
    )
    with http_server(folder, how) as url:
        summary = run(tmp_path, job(tmp_path, [pattern(url)]))
    assert summary["sha256"] == expected
    size = (folder / "shard-00003.tar.bz2").stat().st_size
    assert how.requests["shard-00003.tar.bz2"] >= size // 20_000  # by ranges …
    assert how.sent["shard-00003.tar.bz2"] < 3 * size  # … not from the start each time


def test_a_server_without_ranges_is_read_from_the_start_again(
    tmp_path: Path, folder: Path, expected: str
) -> None:
    latch = tmp_path / "fired"
    with http_server(folder, Behaviour(no_ranges=True)) as url:
        summary = run(
            tmp_path,
            job(tmp_path, [pattern(url)]),
            FINEWEB_FAULT=f"kill:fetcher:fetcher:before_rename:2:{latch}",
        )
    assert latch.exists()
    assert summary["sha256"] == expected


def test_signed_urls_work_and_stay_secret(tmp_path: Path, folder: Path) -> None:
    how = Behaviour()
    with http_server(folder, how) as url:
        signed = f"{url.replace('//', '//user:pass-that-is-secret@')}/shard-00000.tar.bz2"
        run(tmp_path, job(tmp_path, [f"{signed}?sig=query-that-is-secret"]))
        process = start(tmp_path, job(tmp_path / "no", [f"{url}/none.tar?sig=also-that-is-secret"]))
        outcome, err = finish(process)
    assert "sig=query-that-is-secret" in how.queries
    assert "that-is-secret" not in json.dumps(outcome) + err
    (tmp_path / "job.json").unlink()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"that-is-secret" not in path.read_bytes(), path


def test_missing_shards_say_so(tmp_path: Path, folder: Path) -> None:
    with http_server(folder, Behaviour(status={"shard-00001.tar.bz2": [403] * 9})) as url:
        process = start(tmp_path, job(tmp_path, [f"{url}/shard-99999.tar.bz2"]))
        outcome, _ = finish(process)
        assert process.returncode == 5
        assert outcome["what"] == f"{url}/shard-99999.tar.bz2: HTTP 404"
        process = start(tmp_path, job(tmp_path, [f"{url}/shard-00001.tar.bz2"]))
        outcome, _ = finish(process)
        assert "HTTP 403" in outcome["what"]
        assert "expired" in outcome["remedy"]


def test_a_shard_cut_in_half_is_named_and_can_be_skipped(tmp_path: Path, folder: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        half = "00004" in path.name
        (broken / path.name).write_bytes(data[: len(data) // 2] if half else data)
    shards = sorted(broken.iterdir())
    process = start(tmp_path, job(tmp_path, shards))
    outcome, _ = finish(process)
    assert process.returncode == 3
    assert "shard-00004.tar.bz2 is damaged or cut off after record" in outcome["what"]
    assert "--max-bad-shards" in outcome["remedy"]
    one = job(tmp_path / "skip", shards, max_bad_shards=1)
    summary = run(tmp_path / "skip", one)
    assert 0 < summary["documents"] < len(DOCUMENTS)


def test_a_damaged_cache_file_is_fetched_again(tmp_path: Path, folder: Path, expected: str) -> None:
    """The writer is stopped, a cached shard is altered in place, and the run goes on."""
    with http_server(folder) as url:
        one = job(tmp_path, [pattern(url)], prefetch=9)
        cached = tmp_path / "cache"
        run(tmp_path, job(tmp_path, [pattern(url)], prefetch=9, limit_tokens=200))
        for path in cached.glob("*.shard"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
        assert list(cached.glob("*.shard")), "nothing was left in the cache to be damaged"
        process = start(tmp_path, one)
        outcome, err = finish(process)
    assert events(err, "cached_shard_damaged")
    assert outcome["summary"]["sha256"] == expected


def test_bad_records_are_counted_named_and_bounded(tmp_path: Path) -> None:
    lines = [
        b'{"text": "first"}',
        b'{"text": "second"',
        b'{"id": 3}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"",
        b'{"other": [1, {"a": 2}], "text": "last"}',
    ]
    shard = tmp_path / "bad.jsonl.bz2"
    shard.write_bytes(bz2.compress(b"\n".join(lines)))
    summary = run(tmp_path, job(tmp_path, [shard]))
    assert (summary["documents"], summary["bad_records"]) == (2, 6)
    records = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in records] == [f"line {n}" for n in range(2, 8)]
    assert all("bad.jsonl.bz2" in line for line in records)
    process = start(tmp_path / "few", job(tmp_path / "few", [shard], max_bad_records=5))
    outcome, _ = finish(process)
    assert process.returncode == 3
    assert "6 bad records" in outcome["what"]
    assert "line 7" in outcome["what"]


def test_a_cache_keeps_a_strangers_files(tmp_path: Path, folder: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    stranger = cache / "thesis.txt"
    stranger.write_text("precious")
    orphan = cache / f"{'0' * 16}.partial"
    orphan.write_bytes(os.urandom(100))
    with http_server(folder) as url:
        run(tmp_path, job(tmp_path, [pattern(url)]))
    assert stranger.read_text() == "precious"
    assert not orphan.exists()
