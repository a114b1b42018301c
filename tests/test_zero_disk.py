"""--max-disk 0: shards through memory, and not one byte of them on the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.harness import DiskWatcher, english, finish, job, run, start, write_shards
from tests.proxy import Fault, Request, fault_proxy, header, in_turn, simple
from tests.servers import Behaviour, http_server, s3_server
from tests.test_pipeline import reference

DOCUMENTS = english(120)
SHARDS = 4
SHA256 = hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()


def served(tmp_path: Path, form: str) -> list[Path]:
    return write_shards(tmp_path / "served", DOCUMENTS, SHARDS, form)


@pytest.mark.parametrize("form", ["tar.bz2", "parquet"])
def test_the_stream_is_the_same_and_the_disk_stays_empty(tmp_path: Path, form: str) -> None:
    """By one request a shard; a parquet file's head and footer are two more, however many row
    groups it has."""
    paths, how = served(tmp_path, form), Behaviour()
    with http_server(paths[0].parent, how) as url:
        one = job(tmp_path, [f"{url}/{path.name}" for path in paths], max_disk_gb=0)
        with DiskWatcher(tmp_path / "cache") as watcher:
            summary = run(tmp_path, one)
    assert summary["sha256"] == SHA256
    assert summary["fetched_shards"] == 0
    assert watcher.samples > 10
    assert watcher.peak_bytes < 200, "the lock's file alone"
    assert max(how.requests.values()) <= (3 if form == "parquet" else 1)


def test_networks_that_fail_change_nothing(tmp_path: Path) -> None:
    """Resets, refusals, another version for a moment: inside the stream, and by range."""
    paths = served(tmp_path, "jsonl.zst")
    faults: dict[int, list[Fault | None]] = {
        0: [Fault(reset_at=20_000), Fault(reset_at=10), Fault(answer=simple("503 Later"))],
        1: [Fault(close_at=9_000), Fault(head=header("ETag", '"other"'))],
        2: [Fault(stall_at=5_000)],
    }
    plans = [in_turn(*some, name=paths[number].name) for number, some in faults.items()]

    def plan(request: Request) -> Fault | None:
        return next((fault for one in plans if (fault := one(request))), None)

    with http_server(paths[0].parent) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/{path.name}" for path in paths]
        summary = run(tmp_path, job(tmp_path, shards, max_disk_gb=0, timeout_s=1))
    assert summary["sha256"] == SHA256
    assert proxy.faults == 6
    sent = sum(proxy.sent.values())
    assert sent < 1.5 * sum(path.stat().st_size for path in paths), "by range, not from the start"


def test_a_server_without_ranges_is_read_again_and_passed_over(tmp_path: Path) -> None:
    paths = served(tmp_path, "tar.bz2")
    plan = in_turn(Fault(close_at=15_000))
    with (
        http_server(paths[0].parent, Behaviour(no_ranges=True)) as url,
        fault_proxy(url, plan) as proxy,
    ):
        shards = [f"{proxy.url}/{path.name}" for path in paths]
        assert run(tmp_path, job(tmp_path, shards, max_disk_gb=0))["sha256"] == SHA256
    assert proxy.faults == 1


def test_a_resume_goes_on_at_the_exact_token(tmp_path: Path) -> None:
    paths = served(tmp_path, "parquet")
    with http_server(paths[0].parent) as url:
        shards = [f"{url}/{path.name}" for path in paths]
        limit = len(reference(DOCUMENTS)) * 2 // 3
        run(tmp_path, job(tmp_path, shards, max_disk_gb=0, limit_tokens=limit))
        summary = run(tmp_path, job(tmp_path, shards, max_disk_gb=0))
    assert summary["sha256"] == SHA256


def test_a_killed_decompressor_changes_nothing(tmp_path: Path) -> None:
    paths, latch = served(tmp_path, "tar.bz2"), tmp_path / "fired"
    with http_server(paths[0].parent) as url:
        one = job(tmp_path, [f"{url}/{path.name}" for path in paths], max_disk_gb=0)
        spec = f"kill:decompressor:decompressor:mid_block:3:{latch}"
        summary = run(tmp_path, one, FINEWEB_FAULT=spec)
    assert latch.exists()
    assert summary["sha256"] == SHA256


def test_a_store_is_streamed_as_well(tmp_path: Path) -> None:
    objects = {path.name: path.read_bytes() for path in served(tmp_path, "parquet")}
    with s3_server("streamed", objects) as variables:  # moto keeps buckets for the process
        one = job(tmp_path, ["s3://streamed/*.parquet"], max_disk_gb=0)
        assert run(tmp_path, one, **variables)["sha256"] == SHA256


def test_a_shard_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    paths = served(tmp_path, "jsonl.zst")

    def plan(request: Request) -> Fault | None:
        gone = request.method == "GET" and request.name == paths[1].name
        return Fault(answer=simple("403 Forbidden")) if gone else None

    with http_server(paths[0].parent) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/{path.name}" for path in paths]
        process = start(tmp_path, job(tmp_path, shards, max_disk_gb=0))
        outcome, err = finish(process)
        assert process.returncode == 5, err
        assert f"{paths[1].name}: HTTP 403" in outcome["what"]


def test_a_shard_larger_than_the_budget_names_this_mode(tmp_path: Path) -> None:
    paths = served(tmp_path, "jsonl.zst")
    with http_server(paths[0].parent) as url:
        process = start(tmp_path, job(tmp_path, [f"{url}/{paths[0].name}"], max_disk_gb=0.0008))
        outcome, _ = finish(process)
    assert process.returncode == 4
    assert "(the largest shard)" in outcome["what"]
    assert "--max-disk 0" in outcome["remedy"]
