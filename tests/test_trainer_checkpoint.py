"""Checkpoints: which are kept, that a snapshot is of one moment, that the budget holds them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import checkpoints, settings
from pipeline import config as configuration
from pipeline.config import Config, Logging
from pipeline.messages import Cursor, LaneCursor
from tests.harness import DiskWatcher, english, job, run, write_shards
from tests.test_training import SECTIONS, STREAM, steps_of
from trainer import checkpoint
from trainer.loop import Loop
from trainer.saved import use_device

import mlx.core as mx  # isort: skip - after the BLAS

use_device("cpu")
CURSOR = Cursor("", {}, (LaneCursor(0, 0, 0, 0),))


# ── retention ───────────────────────────────────────────────────────────────────────────────


@given(
    losses=st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=30),
    last=st.integers(1, 4),
    best=st.booleans(),
    every=st.one_of(st.none(), st.integers(1, 9)),
)
def test_retention_keeps_what_it_says_and_no_more(
    losses: list[float | None], last: int, best: bool, every: int | None
) -> None:
    """One checkpoint a step, pruned after each, as a run does it."""
    log = Logging(keep_checkpoints=last, keep_best=best, keep_every=every)
    limit = checkpoints.most(_config(log, iters=len(losses)))
    kept: dict[int, float | None] = {}
    for step, loss in enumerate(losses, start=1):
        kept[step] = loss
        kept = {s: kept[s] for s in checkpoints.retained(kept, log)}
        assert len(kept) <= limit
        assert set(range(max(1, step - last + 1), step + 1)) <= set(kept)
        seen = [one for one in losses[:step] if one is not None]
        if best and seen:
            assert min(one for one in kept.values() if one is not None) == min(seen)
        if every:
            assert set(range(every, step + 1, every)) <= set(kept)


def _config(log: Logging, iters: int) -> Config:
    hyper = configuration.Hyperparameters(iters=iters)
    training = configuration.Training(hyperparameters=hyper)
    return Config(name="x", logging=log, training=training)


# ── one snapshot ────────────────────────────────────────────────────────────────────────────


def small_loop(seed: int = 0) -> Loop:
    config = settings.load(
        "demo",
        {
            "model.dimensions.hidden_size": 32,
            "model.dimensions.intermediate_size": 64,
            "model.dimensions.num_layers": 2,
            "data.preprocessing.max_context_size": 16,
            "training.hyperparameters.batch_size": 2,
            "logging.keep_checkpoints": 2,
            "system.seed": seed,
        },
    )
    return Loop(config, 300, mx.float32)


def updates(loop: Loop, count: int) -> None:
    rng = np.random.default_rng(loop.step)

    def rows() -> list[mx.array]:
        return [mx.array(rng.integers(0, 300, 17).astype(np.uint16)) for _ in range(2)]

    for _ in range(count):
        loop.update(rows, lambda: {"wait_s": 0.0})


def everything(loop: Loop) -> dict[str, bytes]:
    parts = {"weights": loop.weights, **loop.state}
    return {
        f"{p}/{n}": np.array(a).tobytes() for p, arrays in parts.items() for n, a in arrays.items()
    }


def test_training_goes_on_while_a_checkpoint_is_written_and_none_of_it_gets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held between the two files while the loop does ten updates."""
    held, go_on = threading.Event(), threading.Event()

    def hold(point: str) -> None:
        if point == "checkpoint:mid_write":
            held.set()
            assert go_on.wait(30)

    monkeypatch.setattr(checkpoint, "faultpoint", hold)
    loop = small_loop()
    updates(loop, 3)
    expected, key = everything(loop), mx.random.state[0].tolist()
    writer = checkpoint.Writer(tmp_path, loop.config.logging)
    writer.begin(checkpoint.snapshot(loop, CURSOR, 1.5))
    assert held.wait(30)
    updates(loop, 10)
    mx.random.uniform()
    mx.eval(loop.weights, loop.state)
    assert not writer.done
    assert checkpoints.whole(tmp_path) == []
    go_on.set()
    state, path, size = writer.result()
    assert (state.step, state.validation_loss) == (3, 1.5)
    assert size == sum(one.stat().st_size for one in path.iterdir())
    assert size <= checkpoint.largest_bytes(loop)
    other = small_loop(seed=9)
    checkpoint.restore(other, path)
    assert everything(other) == expected
    assert mx.random.state[0].tolist() == key
    assert other.step == 3
    updates(other, 10)
    assert everything(other) == everything(loop)


def test_a_write_that_fails_is_tried_again_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = small_loop()
    writer = checkpoint.Writer(tmp_path, loop.config.logging)
    for _ in range(2):
        updates(loop, 1)
        writer.begin(checkpoint.snapshot(loop, CURSOR))
        writer.result()

    def full(point: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "faultpoint", full)
    updates(loop, 1)
    writer.begin(checkpoint.snapshot(loop, CURSOR))
    with pytest.raises(OSError, match="No space"):
        writer.result()
    assert [path.name for path in checkpoints.whole(tmp_path)] == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    assert writer.busy
    writer.begin()
    assert writer.result()[0].step == 3
    kept = sorted(path.name for path in (tmp_path / checkpoints.FOLDER).iterdir())
    assert kept == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    loop = small_loop()
    path, _ = checkpoint.write(checkpoint.snapshot(loop, CURSOR), tmp_path, loop.config.logging)
    file = path / "optimizer.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.write_bytes((path / "weights.safetensors").read_bytes())
    with pytest.raises(Exception, match=r"optimizer\.safetensors"):
        checkpoint.restore(small_loop(), path)


# ── in a run ────────────────────────────────────────────────────────────────────────────────


def test_best_last_and_every_nth_stay_inside_the_budget(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(60), 3, "jsonl.zst")
    sections: dict[str, Any] = {
        **SECTIONS,
        "logging": {
            "steps": {"checkpoint_interval": 4, "validation_interval": 100},
            "keep_checkpoints": 1,
            "keep_best": True,
            "keep_every": 12,
        },
    }
    one = job(tmp_path, shards, kind="train", **sections, **STREAM,
              validation={"share": 0.2, "tokens": 640})  # fmt: skip
    with DiskWatcher(tmp_path / "run" / "checkpoints") as watcher:
        run(tmp_path, one)
    losses = {
        json.loads(line)["step"]: json.loads(line).get("val_loss")
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    }
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    assert set(measured) == {4, 8, 12, 16, 20, 24, 28, 30}
    kept = {int(path.name[5:]) for path in checkpoints.whole(tmp_path / "run")}
    assert kept == {12, 24, 30, min(measured, key=measured.__getitem__)}
    size = max(checkpoints.read(p).size_bytes for p in checkpoints.whole(tmp_path / "run"))
    assert watcher.peak_bytes <= (checkpoints.most(one.config) + 1) * size
    assert set(steps_of(tmp_path)) == set(range(1, 31))
