"""Whole training runs: the same batches and the same loss, whatever dies in between."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import (
    DiskWatcher,
    descendants,
    english,
    finish,
    job,
    run,
    start,
    wait_for_event,
    write_shards,
)
from tests.servers import Behaviour, http_server
from tests.training_jobs import SECTIONS, STEPS, STREAM, final_weights, steps_of, training

DOCUMENTS = english(200)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), DOCUMENTS, 6, "jsonl.zst")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: list[Path]) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    summary = run(folder, training(folder, shards))
    assert summary["restarts"] == 0
    assert summary["first_loss"] - summary["loss"] > 0.5
    return steps_of(folder), final_weights(folder)


def test_every_step_is_logged_and_checkpoints_are_bounded(tmp_path: Path, uninterrupted: Any,
                                                          shards: list[Path]) -> None:  # fmt: skip
    steps, weights = uninterrupted
    assert sorted(steps) == list(range(1, STEPS + 1))
    summary = run(tmp_path, training(tmp_path, shards, workers=1, decompressors=1))
    assert steps_of(tmp_path) == steps
    assert final_weights(tmp_path) == weights
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000028", "step-00000030"]
    log = (tmp_path / "run" / "log.txt").read_text()
    for word in ("loss", "ppl", "tok/s", "tokens", "lr", "disk", "data wait"):
        assert word in log
    assert summary["tokens"] == STEPS * 8 * 64


@pytest.mark.parametrize("point", ["trainer:step", "checkpoint:mid_write"])
def test_everything_killed_at_once_then_resumed(
    tmp_path: Path, shards: list[Path], uninterrupted: Any, point: str
) -> None:
    """The trainer is held at a point, then the supervisor is killed, and all die with it."""
    one = training(tmp_path, shards)
    process = start(tmp_path, one, FINEWEB_FAULT=f"stop:trainer:{point}:2:{tmp_path / 'held'}")
    for line in wait_for_event(process, "consumer_ready"):
        assert '"resuming"' not in line
    deadline = psutil.time.time() + 60
    while not (tmp_path / "held").exists():
        assert psutil.time.time() < deadline
        assert process.poll() is None
        psutil.time.sleep(0.01)
    children = descendants(process.pid)
    process.kill()
    process.communicate()
    for child in children:
        child.send_signal(signal.SIGCONT)  # a stopped process cannot see the hang-up
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    run(tmp_path, one)
    steps, weights = uninterrupted
    assert steps_of(tmp_path) == steps
    assert final_weights(tmp_path) == weights


def test_stop_checkpoints_and_resumes_bitwise(
    tmp_path: Path, shards: list[Path], uninterrupted: Any
) -> None:
    one = training(tmp_path, shards)
    process = start(tmp_path, one)
    for _ in wait_for_event(process, "step_done"):
        pass
    process.send_signal(signal.SIGTERM)
    outcome, err = finish(process)
    assert process.returncode == 75, err
    assert 0 < outcome["summary"]["steps"] < STEPS
    run(tmp_path, one)
    steps, weights = uninterrupted
    assert steps_of(tmp_path) == steps
    assert final_weights(tmp_path) == weights


def test_a_finished_run_has_nothing_to_do_and_more_steps_go_on(
    tmp_path: Path, shards: list[Path], uninterrupted: Any
) -> None:
    one = training(tmp_path, shards)
    run(tmp_path, one)
    again = run(tmp_path, one)
    assert again["steps"] == STEPS
    assert len(steps_of(tmp_path)) == STEPS
    longer = {**SECTIONS["training"]["hyperparameters"], "iters": STEPS + 3}
    more = job(tmp_path, shards, kind="train",
               **(SECTIONS | {"training": {"hyperparameters": longer}}), **STREAM)  # fmt: skip
    assert run(tmp_path, more)["steps"] == STEPS + 3


def test_the_end_of_the_shards_ends_the_run(tmp_path: Path) -> None:
    few = write_shards(tmp_path / "few", DOCUMENTS[:6], 2, "jsonl.zst")
    hyper = {**SECTIONS["training"]["hyperparameters"], "iters": 100_000}
    one = job(tmp_path, few, kind="train",
              **(SECTIONS | {"training": {"hyperparameters": hyper}}),
              **(STREAM | {"epochs": 1, "lanes": 2}))  # fmt: skip
    summary = run(tmp_path, one)
    assert summary["stream_ended"]
    assert 0 < summary["steps"] < 100_000
    assert 0 <= summary["unused_tokens"] < 2 * 8 * 64 + 130


def test_training_stays_inside_the_budget(
    tmp_path: Path, shards: list[Path], uninterrupted: Any
) -> None:
    """1.2 × (the largest shard × lanes + checkpoints), everything in the run's folder counted."""
    _, weights = uninterrupted
    largest = max(path.stat().st_size for path in shards)
    arrays = sum(map(len, weights.values()))
    checkpoint = arrays + (1 << 18)
    fixed = 500_000 + (1 << 18)
    budget = int(1.2 * (3 * largest + 3 * checkpoint)) + fixed
    with http_server(shards[0].parent, Behaviour(bytes_per_s=3e6)) as url:
        urls = [f"{url}/{path.name}" for path in shards]
        one = training(tmp_path, urls, fetchers=4, prefetch=3, max_disk_gb=budget / 1e9)
        with DiskWatcher(tmp_path / "run", tmp_path / "cache") as watcher:
            summary = run(tmp_path, one)
    assert watcher.samples > 200
    assert arrays < watcher.peak_bytes <= budget
    assert summary["peak_disk_bytes"] <= budget
