"""The page about a run, TensorBoard's and W&B's files, and power."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import page
from pipeline.charts import Line, chart, thin, ticks
from pipeline.power import Power
from pipeline.trackers import TensorBoard, WandB


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "time": f"2026-01-02T03:{step // 60:02d}:{step % 60:02d}+00:00",
        "step": step,
        "loss": 5.0 - step / 100,
        "ppl": 100.0,
        "tokens_per_s": 1000.0 + step,
        "total_tokens": 512 * step,
        "step_s": 0.5,
        "data_wait_share": 0.1,
        "lr": 0.01,
        "grad_norm": 1.0,
        "skipped_updates": 0,
        "disk_used_bytes": 4_000_000 + step,
        "disk_budget_bytes": 9_000_000,
        "limiting_stage": "fetch" if step % 2 else "tokenize",
        **more,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "<run>"
    folder.mkdir()
    sample = "<script>alert(1)</script> & é"
    looks = {"val_loss": 4.5, "val_ppl": 90.0, "val_bpb": 1.25, "sample": sample}
    old = [record(step) for step in range(1, 40)]
    new = [record(step, **(looks if step % 20 == 0 else {})) for step in range(35, 81)]
    lines = [json.dumps(one) for one in new]
    (folder / "metrics.jsonl.1").write_text("".join(json.dumps(one) + "\n" for one in old))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, lines[-1][:50]]))
    (folder / "log.txt").write_text("12:00 [info  ] fine\n12:01 [warning  ] worker_died who=<x>\n")
    (folder / "config.yaml").write_text("name: '<run>'\n")
    return folder


class Reader(html.parser.HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(v) for key, v in attrs if key in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(run_dir: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "fineweb-pipeline", "report", run_dir,
         "--out", run_dir / "page.html"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    source = (run_dir / "page.html").read_text()
    reader = Reader()
    reader.feed(source)
    assert reader.loads == []
    assert "script" not in reader.tags
    assert not re.search(r"url\(|@import|https?://", source)
    for said in (
        "steps 1 to 80", "<script>alert(1)</script> & é", "4.990 → 4.200", "4.500 at 40", "1.250",
        "who=<x>", "name: '<run>'", "waited for data10.0 %", "fetch2.0 s5.00 %",
        "tokenize2.0 s5.00 %",
    ):  # fmt: skip
        assert said in reader.text, said
    assert reader.tags.count("svg") == 7  # a chart for each metric that was recorded


def test_a_step_counts_once_and_a_torn_line_not_at_all(run_dir: Path) -> None:
    assert [one["step"] for one in page.read(run_dir)] == list(range(1, 81))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"has no metrics\.jsonl"):
        page.read(tmp_path)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_ticks_span_their_interval(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high), 1e-3)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))


@given(st.lists(st.floats(allow_nan=True), min_size=1, max_size=3000))
def test_lines_are_thinned_and_hold_no_number_that_is_none(ys: list[float]) -> None:
    line = thin(Line("x", list(range(len(ys))), ys, "c1"))
    assert len(line.xs) == len(line.ys) <= 600
    finite = [y for y in ys if abs(y) < 1e18]
    assert bool(line.ys) == bool(finite)
    assert "nan" not in chart("t", [Line("x", list(range(len(ys))), ys, "c1")])


def test_tensorboard_reads_back_what_was_written_and_the_limit_holds(tmp_path: Path) -> None:
    limit = 60_000
    tracker = TensorBoard(tmp_path, limit)
    for step in range(1, 2_000):
        tracker.step(record(step, **({"sample": "once upon"} if step == 3 else {})))
    tracker.close()
    assert 0.8 * limit < sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    losses = events.Scalars("loss")
    assert [one.step for one in losses[:3]] == [1, 2, 3]
    assert losses[1].value == pytest.approx(4.98)
    assert 20 < len(losses) < 1_999
    assert b"once upon" in events.Tensors("sample/text_summary")[0].tensor_proto.string_val
    again = TensorBoard(tmp_path, limit)
    for step in range(2_000, 2_010):
        again.step(record(step))
    again.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


_WANDB_BLOCK, _WANDB_HEADER = 32_768, 7  # LevelDB's log format


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline run's file."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = path.read_bytes(), _WANDB_HEADER, b"", []
    while at + _WANDB_HEADER <= len(data):
        if _WANDB_BLOCK - at % _WANDB_BLOCK < _WANDB_HEADER:  # padding
            at += _WANDB_BLOCK - at % _WANDB_BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += _WANDB_HEADER + size
        if kind in (1, 4):  # full, last
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def test_wandb_has_the_metrics_and_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "X-Amz-Signature=abcdef0123456789"
    monkeypatch.setattr(sys, "argv", ["fineweb-pipeline", "start", f"--shards=https://h/?{secret}"])
    monkeypatch.chdir(tmp_path)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    tracker = WandB("a-project", tmp_path / "runs" / "one", {"model": {"layers": 4}})
    for step in range(1, 4):
        tracker.step(record(step))
    tracker.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = wandb_records(file)
    (run,) = [one.run for one in records if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("a-project", "one")
    history = [one.history for one in records if one.WhichOneof("record_type") == "history"]
    losses = [
        float(item.value_json)
        for one in history
        for item in one.item
        if "loss" in (item.key, *item.nested_key)
    ]
    assert losses == [record(step)["loss"] for step in range(1, 4)]
    for path in (tmp_path / "wandb").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_power_is_read_from_the_counters_or_not_at_all(tmp_path: Path) -> None:
    assert Power(tmp_path, "libnothing.so").watts() is None
    counters = []
    for package in range(2):
        zone = tmp_path / f"intel-rapl:{package}"
        zone.mkdir()
        counters.append(zone / "energy_uj")
        counters[-1].write_text("1000000\n")
    inner = tmp_path / "intel-rapl:0:0"  # a part of package 0: not counted again
    inner.mkdir()
    (inner / "energy_uj").write_text("1\n")
    power = Power(tmp_path, "libnothing.so")
    assert power.watts() is None  # nothing to compare with yet
    begin = time.monotonic()
    time.sleep(0.05)
    counters[0].write_text("1500000\n")
    counters[1].write_text("3\n")  # wrapped
    watts = power.watts()
    seconds = time.monotonic() - begin
    assert watts is not None
    assert 0.5 / (seconds + 0.05) < watts < 0.5 / 0.04
