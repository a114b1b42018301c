"""Guards and limits: spikes, bad updates with their provenance, time, memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Guards
from pipeline.settings import load
from tests.harness import ROOT, english, finish, job, run, start, write_shards
from tests.test_training import SECTIONS, STREAM, steps_of
from trainer import guards, sizing
from trainer.loop import Loop
from trainer.saved import use_device

import mlx.core as mx  # isort: skip - after the BLAS

use_device("cpu")


class Reference:
    """The running statistic in float64: Welford's at first, then with a fixed weight."""

    def __init__(self, config: Guards) -> None:
        self.config = config
        self.mean = self.variance = 0.0
        self.seen = self.skipped = self.in_a_row = self.spikes = 0

    def judge(self, loss: float, norm: float) -> bool:
        finite = bool(np.isfinite(loss) and np.isfinite(norm))
        limit = self.mean + self.config.spike_sigmas * self.variance**0.5
        spike = finite and self.seen >= 20 and loss > limit
        if finite:
            weight = max(0.02, 1 / (self.seen + 1))
            off = (limit if spike else loss) - self.mean
            self.mean += weight * off
            self.variance = (1 - weight) * (self.variance + weight * off * off)
            self.seen += 1
        apply = finite and not (spike and self.config.skip_spikes)
        self.spikes += spike
        self.skipped += not apply
        self.in_a_row = 0 if apply else self.in_a_row + 1
        return apply


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bad=st.dictionaries(
        st.integers(0, 79), st.sampled_from([9.0, 30.0, float("nan"), float("inf")])
    ),
    skip=st.booleans(),
)
def test_the_judge_is_its_reference(seed: int, bad: dict[int, float], skip: bool) -> None:
    config = Guards(skip_spikes=skip)
    reference, state = Reference(config), guards.init()
    losses = 4 + np.exp(-np.arange(80) / 30) + np.random.default_rng(seed).normal(0, 0.05, 80)
    for step in range(80):
        loss = bad.get(step, losses[step])
        apply, state, metrics = guards.judge(mx.array(loss), mx.array(1.0), state, config)
        assert apply.item() == reference.judge(loss, 1.0), step
    assert state["mean"].item() == pytest.approx(reference.mean, rel=1e-4)
    assert state["variance"].item() == pytest.approx(reference.variance, rel=1e-2)
    for name, count in (
        ("skipped", reference.skipped),
        ("skipped_in_a_row", reference.in_a_row),
        ("spikes", reference.spikes),
    ):
        assert state[name].item() == count
    assert metrics["skipped_updates"].item() == reference.skipped


def small_loop(**changes: Any) -> Loop:
    config = load(
        "demo",
        {
            "model.dimensions.hidden_size": 32,
            "model.dimensions.intermediate_size": 64,
            "model.dimensions.num_layers": 2,
            "data.preprocessing.max_context_size": 16,
            "training.hyperparameters.batch_size": 2,
            "training.hyperparameters.gradient_accumulation_steps": 1,
            "training.hyperparameters.learning_rate": 1e-4,
            **changes,
        },
    )
    return Loop(config, 300, mx.float32)


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_told_and_skipped_if_asked(skip: bool) -> None:
    loop = small_loop(
        **{"training.guards.skip_spikes": skip, "training.optimization.optimizer": "adamw"}
    )
    rng = np.random.default_rng(0)

    def rows() -> list[mx.array]:
        return [mx.array(rng.integers(0, 300, 17)) for _ in range(2)]

    for _ in range(25):
        loop.update(rows, lambda: {"wait_s": 0.0})
    calm = loop.metrics(flush=True)[-1]
    assert (calm["loss_spikes"], calm["skipped_updates"]) == (0, 0)
    good, before = loop.weights, {n: np.array(a) for n, a in loop.weights.items()}
    loop.weights = {n: a * 40 if a.ndim > 1 else a for n, a in good.items()}
    wild = dict(loop.weights)
    loop.update(rows, lambda: {"wait_s": 0.0})
    spiked = loop.metrics(flush=True)[-1]
    assert spiked["loss"] > spiked["spike_limit"] > calm["loss"]
    assert (spiked["loss_spikes"], spiked["skipped_updates"]) == (1, int(skip))
    changed = any(
        not np.array_equal(np.array(a), np.array(wild[n])) for n, a in loop.weights.items()
    )
    assert changed is not skip
    assert before.keys() == loop.weights.keys()


def test_bad_updates_end_the_run_and_name_their_documents(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(60), 3, "jsonl.zst")
    training = {**SECTIONS["training"], "guards": {"max_skipped": 3}}
    training["hyperparameters"] = {**training["hyperparameters"], "learning_rate": 1e30}
    one = job(tmp_path, shards, kind="train", **(SECTIONS | {"training": training}), **STREAM)
    process = start(tmp_path, one)
    error, _ = finish(process)
    assert process.returncode == 2, error
    assert re.search(r"3 updates in a row were skipped, the last one \d+", error["what"])
    assert "not finite" in error["what"]
    places = re.findall(
        r"lane (\d), windows (\d+) to (\d+): (\S+), block (\d+), token (\d+)", error["what"]
    )
    assert [place[0] for place in places] == ["0", "1", "2"]
    assert {Path(place[3]).name for place in places} <= {path.name for path in shards}
    assert sum(int(place[2]) - int(place[1]) + 1 for place in places) == 8
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_time_limit_checkpoints_and_says_resume(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(60), 3, "jsonl.zst")
    hyper = {**SECTIONS["training"]["hyperparameters"], "iters": 100_000}
    sections = {**SECTIONS, "training": {"hyperparameters": hyper}}
    sections["system"] = {"seed": 3, "time_limit_s": 3.0}
    sections["logging"] = {**SECTIONS["logging"], "max_log_mb": 16.0}  # every update is kept
    process = start(tmp_path, job(tmp_path, shards, kind="train", **sections, **STREAM))
    outcome, err = finish(process)
    assert process.returncode == 75, err
    assert outcome["summary"]["stopped"] == "time limit of 3.0 s"
    done = outcome["summary"]["steps"]
    assert 0 < done < 100_000
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1].name == f"step-{done:08d}"
    assert len(steps_of(tmp_path)) == done


@given(
    windows=st.integers(1, 96),
    one=st.integers(1, 10**9),
    each=st.integers(0, 10**8),
    memory=st.integers(0, 10**10),
)
def test_the_batch_is_the_largest_divisor_that_fits(
    windows: int, one: int, each: int, memory: int
) -> None:
    batch = sizing.largest(windows, one, one + each, memory)
    assert windows % batch == 0
    assert batch == 1 or one + (batch - 1) * each <= memory
    larger = [n for n in range(batch + 1, windows + 1) if windows % n == 0]
    assert all(one + (n - 1) * max(each, 1) > memory for n in larger)


def test_auto_keeps_the_windows_of_an_update_and_a_resume_its_batch(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(60), 3, "jsonl.zst")
    hyper = {"iters": 6, "batch_size": "auto", "gradient_accumulation_steps": 12}
    sections = {**SECTIONS, "training": {"hyperparameters": hyper}}
    one = job(tmp_path, shards, kind="train", **sections, **STREAM)
    summary = run(tmp_path, one)
    assert summary["tokens"] == 6 * 12 * 64
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    kept = json.loads(state.read_text())["config"]["training"]["hyperparameters"]
    assert kept["batch_size"] * kept["gradient_accumulation_steps"] == 12
    assert kept["batch_size"] > 1
    for batch in (3, kept["batch_size"]):  # as if memory had been another
        kept |= {"batch_size": batch, "gradient_accumulation_steps": 12 // batch}
        whole = json.loads(state.read_text())
        whole["config"]["training"]["hyperparameters"] = kept
        state.write_text(json.dumps(whole))
        settled = sizing.settle(one.config, 600, mx.float32, 599, str(state.parent))
        assert settled.training.hyperparameters.batch_size == batch


def test_without_mlx_it_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open')")
    done = subprocess.run(
        [sys.executable, "-c", "from trainer import blas; blas.preload()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert "ConfigError: MLX cannot be imported: libmlx.so" in done.stderr
    assert "mlx[cuda13]" in done.stderr or sys.platform == "darwin"
