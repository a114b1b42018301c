"""Disks that are full, gone, read-only, shared with strangers, damaged, or without power."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cache, checkpoints, log
from pipeline.errors import ExitCode
from tests.disks import Op, Recorder, after_power_loss, fill, small_disk
from tests.harness import english, events, finish, job, run, start, wait_for_event, write_shards
from tests.servers import Behaviour, eventually, http_server
from tests.training_jobs import final_weights, steps_of, training

DOCUMENTS = english(120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), DOCUMENTS, 4, "jsonl.zst")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, shards: list[Path]) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    return str(run(folder, job(folder, shards))["sha256"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: list[Path]) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    run(folder, training(folder, shards))
    return steps_of(folder), final_weights(folder)


# ── a full disk ─────────────────────────────────────────────────────────────────────────────


def test_a_disk_that_is_full_in_the_middle_of_a_shard_is_waited_for(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    largest = max(path.stat().st_size for path in shards)
    with http_server(shards[0].parent) as url, small_disk(tmp_path / "cache", 2 << 20) as real:
        urls = [f"{url}/{path.name}" for path in shards]
        if real:
            ballast = fill(tmp_path / "cache", largest // 2)
        faults = "" if real else f"full:fetcher:fetcher:mid_write:2:{tmp_path / 'full'}"
        process = start(tmp_path, job(tmp_path, urls, prefetch=0), FINEWEB_FAULT=faults)
        seen = list(wait_for_event(process, "disk_full"))
        if real:
            ballast.unlink()
        outcome, _ = finish(process)
        assert "No space left" in seen[-1]
        assert outcome["summary"]["sha256"] == expected


def test_a_disk_that_is_full_in_the_middle_of_a_log_line_loses_that_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "run", 256 << 10) as real:
        files = log.RunLog(tmp_path / "run", 10 << 20)
        files.event("info", "bad_record", place="first")
        if real:
            ballast = fill(tmp_path / "run")
        else:
            monkeypatch.setattr(log, "faultpoint", _full)
        for number in range(40):
            files.event("info", "bad_record", place=f"{number} {'x' * 3000}")
        assert files.lost_lines > 0
        if real:
            ballast.unlink()
        else:
            monkeypatch.undo()
        files.event("info", "bad_record", place="last")
        files.close()
        lines = (tmp_path / "run" / "bad_records.jsonl").read_bytes().splitlines()
        places = [json.loads(line)["place"] for line in lines]  # every line is whole
        assert (places[0], places[-1]) == ("first", "last")


def _full(point: str) -> None:
    raise OSError(28, "No space left on device")


def test_a_log_whose_folder_vanishes_goes_on_losing_lines(tmp_path: Path) -> None:
    files = log.RunLog(tmp_path, 6000)
    shutil.rmtree(tmp_path)
    for number in range(100):
        files.event("info", "worker_died", who=f"{number}")
    assert files.lost_lines > 0
    files.close()


def test_a_checkpoint_that_meets_a_full_disk_is_written_when_there_is_room(
    tmp_path: Path, shards: list[Path], trained: Any
) -> None:
    with small_disk(tmp_path / "run", 4 << 20) as real:
        faults = "" if real else f"full:trainer:checkpoint:mid_write:2:{tmp_path / 'full'}"
        process = start(tmp_path, training(tmp_path, shards), FINEWEB_FAULT=faults)
        if real:
            for _ in wait_for_event(process, "consumer_ready"):
                pass
            ballast = fill(tmp_path / "run", 100_000)
        (*_, said) = wait_for_event(process, "checkpoint_waits_for_disk")
        assert "free some space: fetching pauses" in said
        assert checkpoints.latest(tmp_path / "run") is None or not real
        if real:
            ballast.unlink()
        outcome, err = finish(process)
        assert process.returncode == 0, err
        assert outcome["summary"]["restarts"] == 0
        assert (steps_of(tmp_path), final_weights(tmp_path)) == trained


def test_a_disk_that_stays_full_ends_the_run_and_the_checkpoint_before_stays(
    tmp_path: Path, shards: list[Path], trained: Any
) -> None:
    one = training(tmp_path, shards, disk_wait_s=0.0)
    fault = f"full:trainer:checkpoint:mid_write:3:{tmp_path / 'full'}"  # of the second one
    process = start(tmp_path, one, FINEWEB_FAULT=fault)
    outcome, _ = finish(process)
    assert process.returncode == ExitCode.DISK
    assert "a checkpoint could not be written" in outcome["what"]
    assert "free some space" in outcome["remedy"]
    latest = checkpoints.latest(tmp_path / "run")
    assert latest is not None and latest.state.step == 7
    run(tmp_path, one)
    assert (steps_of(tmp_path), final_weights(tmp_path)) == trained


def test_token_files_that_meet_a_full_disk_go_on_at_the_token(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    with small_disk(tmp_path / "run", 4 << 20) as real:
        one = job(tmp_path, shards, writer_save_s=0.05)
        if real:
            ballast = fill(tmp_path / "run", 60_000)
        faults = "" if real else f"full:writer:writer:mid_write:9:{tmp_path / 'full'}"
        process = start(tmp_path, one, FINEWEB_FAULT=faults)
        outcome, err = finish(process)
        assert process.returncode == ExitCode.DISK, err
        assert "No space left on device" in outcome["what"]
        assert "free some space" in outcome["remedy"]
        if real:
            ballast.unlink()
        assert run(tmp_path, one)["sha256"] == expected


# ── folders that change under the run ───────────────────────────────────────────────────────


def test_a_cache_folder_that_turns_read_only_ends_the_run_and_it_resumes(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    folder = tmp_path / "cache"
    with http_server(shards[0].parent, Behaviour(bytes_per_s=60_000)) as url:
        one = job(tmp_path, [f"{url}/{path.name}" for path in shards], fetchers=1, prefetch=0)
        process = start(tmp_path, one)
        for _ in wait_for_event(process, "shard_fetched"):
            pass
        with _read_only(folder):
            outcome, err = finish(process)
        assert process.returncode == ExitCode.DISK, err
        assert str(folder) in outcome["what"]
        assert "may be written" in outcome["remedy"]
        assert run(tmp_path, one)["sha256"] == expected


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written into the folder, by root neither: a read-only disk lies over it."""
    if os.geteuid() == 0:
        over = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)],
            capture_output=True, check=False,
        )  # fmt: skip
        if over.returncode:
            pytest.skip("root may write everywhere, and nothing may be mounted here")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        folder.chmod(0o500)
        try:
            yield
        finally:
            folder.chmod(0o700)


def test_the_whole_folder_gone_is_a_clear_error(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    with http_server(shards[0].parent, Behaviour(bytes_per_s=60_000)) as url:
        one = job(tmp_path, [f"{url}/{path.name}" for path in shards], fetchers=1, prefetch=0)
        process = start(tmp_path, one)
        for _ in wait_for_event(process, "shard_fetched"):
            pass
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        outcome, err = finish(process)
        assert process.returncode == ExitCode.DISK, err
        assert str(tmp_path / "cache") in outcome["what"]
        assert run(tmp_path, one)["sha256"] == expected


def test_a_strangers_files_stay_and_count_for_nothing(tmp_path: Path, shards: list[Path]) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    names = ["notes.txt", "x.partial", "0123456789abcdef.shard", "0123.12.0123.shard", "a.bin"]
    for name in names:
        (folder / name).write_bytes(b"mine" * 1000)
    with http_server(shards[0].parent) as url:
        run(tmp_path, job(tmp_path, [f"{url}/{path.name}" for path in shards]))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, cache.LOCK_FILE])
    assert all((folder / name).read_bytes() == b"mine" * 1000 for name in names)


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Plain JSON lines, which have no checksum of their own: folder, names, undisturbed sha256."""
    folder = tmp_path_factory.mktemp("remote")
    paths = [folder / f"shard-{number}.jsonl" for number in range(3)]
    for number, path in enumerate(paths):
        texts = DOCUMENTS[number * 20 : number * 20 + 20]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    undisturbed = tmp_path_factory.mktemp("unchecked")
    summary = run(undisturbed, job(undisturbed, paths))
    return folder, [path.name for path in paths], summary["sha256"]


@pytest.mark.parametrize("how", ["cut", "altered", "deleted"])
def test_a_damaged_shard_in_the_cache_is_found_and_fetched_again(
    tmp_path: Path, unchecked: tuple[Path, list[str], str], how: str
) -> None:
    """Damaged just before it is read."""
    folder, names, undisturbed = unchecked
    opening = tmp_path / "opening"
    with http_server(folder) as url:
        process = start(
            tmp_path,
            job(tmp_path, [f"{url}/{name}" for name in names], decompressors=1, prefetch=0),
            FINEWEB_FAULT=f"stop:decompressor:received:OpenShard:2:{opening}",
        )
        eventually(opening.exists, 60)
        found = (tmp_path / "cache").glob("*.shard")
        path = max(found, key=lambda one: one.stat().st_mtime_ns)  # the one that is to be opened
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1  # another letter, in valid JSON as likely as not
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(data[: len(data) // 2] if how == "cut" else data)
        os.kill(int(opening.read_text().split()[1]), signal.SIGCONT)
        outcome, err = finish(process)
    assert len(events(err, "cached_shard_damaged")) == 1
    assert outcome["summary"]["sha256"] == undisturbed


def test_what_an_earlier_run_left_is_checked_before_it_is_used(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    held = tmp_path / "held"
    with http_server(shards[0].parent) as url:
        one = job(tmp_path, [f"{url}/{path.name}" for path in shards])
        process = start(tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:2:{held}")
        eventually(held.exists, 60)
        eventually(lambda: len(list((tmp_path / "cache").glob("*.shard"))) >= 2, 60)
        process.kill()
        process.communicate()
        first, second, *_ = sorted((tmp_path / "cache").glob("*.shard"))
        first.write_bytes(first.read_bytes()[:-100])  # found by its size
        data = bytearray(second.read_bytes())
        data[len(data) // 3] ^= 0xFF
        second.write_bytes(data)  # found by its checksum
        again = start(tmp_path, one)
        outcome, err = finish(again)
    assert len(events(err, "cached_shard_damaged")) == 1
    assert outcome["summary"]["sha256"] == expected


# ── power loss ──────────────────────────────────────────────────────────────────────────────


@dataclass(repr=False)
class Saves:
    """What was done to the disk, in order, and what each checkpoint must hold."""

    ops: list[Op]
    whole: dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """Everything that three checkpoints do to the disk with one kept, and what each must hold."""
    import mlx.core as mx

    from pipeline.config import Logging
    from pipeline.messages import Counts, Cursor, LaneCursor
    from trainer import checkpoint
    from trainer.loop import Loop

    root = tmp_path_factory.mktemp("power")
    loop = Loop(training(root, []).config, 600, mx.float32)
    cursor = Cursor("f", {}, (LaneCursor(0, 0, 0, 0),), Counts())
    recorder = Recorder(root)
    whole = {}
    with recorder.recording():
        for step in (1, 2, 3):
            loop.step = step
            one = checkpoint.snapshot(loop, cursor)
            path, _ = checkpoint.write(one, root, Logging(keep_checkpoints=1))
            recorder.ops.append(Op("saved", path.name))
            whole[path.name] = {file.name: file.read_bytes() for file in path.iterdir()}
    assert {"create", "write", "fsync", "mkdir", "rename", "unlink"} <= {
        o.kind for o in recorder.ops
    }
    return Saves(recorder.ops, whole)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_after_a_power_loss_there_is_a_whole_checkpoint(saves: Saves, data: st.DataObject) -> None:
    """At any operation, with any unsynced names and any part of unsynced data on the disk."""
    ops, whole = saves.ops, saves.whole
    end = data.draw(st.integers(0, len(ops)), label="operations before the loss")
    done = [op for op in ops[:end] if op.kind != "saved"]
    files = after_power_loss(
        done,
        keep=lambda i: data.draw(st.booleans(), label=f"{done[i]}"[:60]),
        torn=lambda i, size: data.draw(st.integers(0, size)),
    )
    found: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        folder, name = Path(path).parts[-2:]
        found.setdefault(folder, {})[name] = content
    named_whole = sorted(folder for folder in found if folder in whole)
    for folder in named_whole:  # what bears the name of a whole one is one
        assert found[folder] == whole[folder], f"{folder} is torn"
    saved = [op.path for op in ops[:end] if op.kind == "saved"]
    if saved:  # and no older one than the last that was reported
        assert named_whole and named_whole[-1] >= saved[-1]


def test_the_power_loss_test_can_fail(saves: Saves) -> None:
    """Without the fsyncs the same operations leave a torn checkpoint."""
    ops, whole = saves.ops, saves.whole
    careless = [op for op in ops if op.kind not in ("fsync", "saved")]
    files = after_power_loss(careless, keep=lambda i: True, torn=lambda i, size: size // 2)
    torn = [
        path
        for path, content in files.items()
        if Path(path).parts[-2] in whole and content != whole[Path(path).parts[-2]][Path(path).name]
    ]
    assert torn
