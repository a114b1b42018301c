"""The campaign itself: it holds on a small corpus, and each of its checks can fail."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import demo
from pipeline.chaos import campaign, jobs
from pipeline.chaos.campaign import Campaign
from pipeline.chaos.command import describe
from pipeline.chaos.jobs import MetricsReader, reference_hashes
from pipeline.chaos.observe import Observer, Series
from pipeline.workers.writer import header
from tests.servers import eventually


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of a second instead of ten."""
    whole = demo.documents
    monkeypatch.setattr(demo, "documents", lambda: itertools.islice(whole(), 150))
    monkeypatch.setattr(demo, "_NUM_SHARDS", 12)


def test_a_short_campaign_holds_and_says_what_it_did(tmp_path: Path, small: None) -> None:
    report = Campaign(tmp_path, seed=4, minutes=0.12, kind="tokenize", tell=print).run()
    assert report.problems == []
    assert report.rounds >= 1
    assert sum(report.faults.values()) > 3
    assert report.fetched_bytes >= report.undisturbed_bytes > 0
    text = describe(report)
    assert text.endswith("verdict: every promise held")
    assert f"supervisors started: {report.supervisors}" in text


def test_another_stream_is_a_broken_promise(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undisturbed run stops a token early, so its stream is another one."""
    plain = jobs.Job.reference
    monkeypatch.setattr(jobs.Job, "reference", lambda self, limit: plain(self, 100_000))
    monkeypatch.setattr(jobs, "_ROUND_EPOCHS", 1)
    report = Campaign(tmp_path, seed=4, minutes=0.05, kind="tokenize", tell=print).run()
    assert any("sha256" in problem for problem in report.problems)
    assert describe(report).endswith("verdict: a promise was broken")


def test_a_run_that_fails_as_none_may_is_a_broken_promise(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.Job, "command", lambda self: [sys.executable, "-c", "1 / 0"])
    monkeypatch.setattr(campaign.Campaign, "_reference", lambda self, server, limit: ("", 0))
    report = Campaign(tmp_path, seed=1, minutes=0.1, kind="tokenize", tell=print).run()
    assert any("ZeroDivisionError" in problem for problem in report.problems)


def test_growth_and_a_budget_that_is_passed_are_found(tmp_path: Path) -> None:
    observer = Observer((tmp_path,), budget_bytes=1000)
    observer.disk.values = [10, 1000, 20]
    observer.descriptors.values = [100.0] * 60
    observer.supervisor_memory.values = [50e6] * 60
    assert observer.problems() == []
    observer.disk.values.append(1001)
    observer.descriptors.values = [float(n) for n in range(100, 160)]
    observer.supervisor_memory.values = [50e6 + 4e6 * n for n in range(60)]
    assert [problem.split(" ")[0] for problem in observer.problems()] == [
        "memory", "descriptors", "1001",
    ]  # fmt: skip
    assert not Series("short", [1, 2, 3, 1000]).grew(1.0, 0.0)


def test_a_process_that_is_left_behind_is_found(tmp_path: Path) -> None:
    observer = Observer((tmp_path,), 1)
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    tree = psutil.Process(parent.pid)
    eventually(lambda: len(tree.children()) == 1)
    observer.remember(tree)
    (child,) = tree.children()
    parent.kill()
    parent.wait()
    assert observer.left_behind(timeout_s=0.1) == [f"process {child.pid} is still alive"]
    child.kill()
    eventually(lambda: observer.left_behind(timeout_s=0) == [])


def test_metrics_are_followed_over_rotation_and_a_repeated_update_must_be_the_same(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    reader.poll()

    def line(step: int, batch_hash: str) -> str:
        return json.dumps({"step": step, "batch_hash": batch_hash, "loss": 1.0}) + "\n"

    path.write_text(line(1, "a") + line(2, "b")[:9])
    reader.poll()
    with path.open("a") as file:
        file.write(line(2, "b")[9:])
        file.write(line(3, "c"))
    path.replace(tmp_path / "metrics.jsonl.1")
    path.write_text(line(3, "c") + line(4, "d"))
    reader.poll()
    assert reader.hashes.by_step == {1: "a", 2: "b", 3: "c", 4: "d"}
    assert reader.hashes.problems == []
    with path.open("a") as file:
        file.write(line(4, "e"))
    reader.poll()
    assert len(reader.hashes.problems) == 1


def test_reference_hashes_are_those_of_interleaved_windows(tmp_path: Path) -> None:
    """Against a literal construction: L streams, window k of each in turn, T + 1 tokens each."""
    T, L, per_update = jobs.SEQ_LEN, jobs.LANES, jobs.UPDATE_TOKENS // jobs.SEQ_LEN
    lanes = np.random.default_rng(0).integers(0, 1000, (L, 9 * T), dtype=np.uint16)
    written = np.concatenate(
        [lanes[lane, k * T : (k + 1) * T] for k in range(9) for lane in range(L)]
    )
    (tmp_path / "tokens_000000.bin").write_bytes(header(len(written), 2) + written.tobytes())
    for update, said in reference_hashes(tmp_path, 2).items():
        digests = []
        for window in range((update - 1) * per_update, update * per_update):
            lane, k = window % L, window // L
            row = lanes[lane, k * T : (k + 1) * T + 1].tobytes()
            digests.append(hashlib.sha256(row).digest())
        assert hashlib.sha256(b"".join(digests)).hexdigest() == said
