"""What a run shows of itself: the verdict, the screen, the status file, and the server."""

from __future__ import annotations

import http.client
import io
import json
import math
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from pipeline import live_page, screen, status_file, verdict, view
from pipeline.cli_status import exit_code
from pipeline.errors import ConfigError
from pipeline.status import Curve, DiskStatus, StageStatus, Status
from pipeline.status_file import Ended, Recorded, Writer
from tests.harness import english, finish, job, start, write_shards
from tests.test_cli import PROGRAM, call


def stage(name: str, workers: int = 2, busy: float = 1.0) -> StageStatus:
    return StageStatus(name, workers, busy, 1.5e6, "B/s", 3, 8, 0)


def a_status(scale: float = 1.0, **changes: Any) -> Status:
    """A status whose numbers are as large as one likes."""
    size = int(1e9 * scale)
    disk = DiskStatus(
        35 * size, 30 * size, 20 * size, size, 8 * size, size, size, 99 * size, 99_999, 999
    )
    metrics = {
        "step": 5, "loss": 3.5, "ppl": 33.0, "tokens_per_s": 1e4 * scale, "lr": 0.01,
        "total_tokens": 1e9 * scale, "step_s": 0.5 * scale, "data_wait_share": 0.2,
    }  # fmt: skip
    plain = Status(
        name="run",
        kind="train",
        phase="running",
        elapsed_s=4000 * scale,
        step=5,
        total_steps=100,
        metrics=metrics,
        stages=tuple(map(stage, ("fetch", "decompress", "tokenize"))),
        ring_fill=0.5,
        disk=disk,
        bad_records=1,
        restarts=2,
        verdict="tokenizers limit: add 2 (6 idle cores); the trainer waits 20.0 %",
        losses=tuple(5 - n / 50 for n in range(100)),
        notes=("x" * 160,) * 4,
        url="http://127.0.0.1:65535/",
    )
    return msgspec.structs.replace(plain, **changes)


# ── the verdict ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "wait", "limiting", "busy", "idle", "said"),
    [
        ("train", None, {"consumer": 1.0}, 1.0, 0.0, "waiting for the first update"),
        ("train", 0.001, {"consumer": 0.9, "fetch": 0.1}, 1.0, 0.0,
         "trainer-bound: data waits 0.1 %"),
        ("train", 0.198, {"consumer": 1.0}, 1.0, 0.0,
         "trainer-bound now; before, the trainer waited 19.8 %"),
        ("train", 0.5, {"consumer": 0.5, "tokenize": 0.5}, 1.0, 6.0,
         "tokenizers limit: add 2 (6 idle cores); the trainer waits 50.0 %"),
        ("train", 0.5, {"consumer": 0.5, "tokenize": 0.5}, 1.0, 1.1,
         "tokenizers limit: add 1 (1 idle core); the trainer waits 50.0 %"),
        ("train", 0.5, {"tokenize": 0.4, "decompress": 0.6}, 1.0, 0.2,
         "decompressors limit: all 8 cores are busy; the trainer waits 50.0 %"),
        ("train", 0.2, {"fetch": 1.0}, 0.3, 6.0,
         "shards come late, fetchers idle 70 %: raise --max-disk or --prefetch; "
         "the trainer waits 20.0 %"),
        ("tokenize", None, {"fetch": 1.0}, 0.9, 6.0,
         "fetchers limit: a faster source, or --fetchers 4"),
        ("tokenize", None, {"tokenize": 0.6, "consumer": 0.4}, 0.9, 3.8,
         "tokenizers limit: add 4 (4 idle cores)"),
        ("tokenize", None, {"tokenize": 0.2, "consumer": 0.8}, 0.9, 3.8,
         "writer-bound: the disk that is written to limits"),
        ("tokenize", None, {"tokenize": 1.0}, 0.9, None, "tokenizers limit"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_limits_and_what_helps(
    kind: str, wait: float | None, limiting: dict[str, float], busy: float, idle: float, said: str
) -> None:
    stages = [stage(name, busy=busy) for name in ("fetch", "decompress", "tokenize")]
    seen = verdict.Evidence(kind, wait, limiting, stages, idle, 8)
    assert verdict.verdict(seen) == said


def test_the_verdict_follows_the_last_seconds_and_the_summary_the_whole_run() -> None:
    witness = verdict.Witness("train", 8)
    for _ in range(100):
        witness.saw("tokenize")
        witness.update(1.0, 0.5)
    for _ in range(60):
        witness.saw("consumer")
        witness.update(1.0, 0.0)
    assert witness.now((), None) == "trainer-bound: data waits 0.0 %"
    assert witness.whole((), None) == "tokenizers limit; the trainer waits 31.2 %"
    assert witness.wait_share == pytest.approx(50 / 160)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=1500))
def test_a_curve_is_bounded_and_its_points_are_means_of_equal_stretches(
    values: list[float],
) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    finite = [value for value in values if math.isfinite(value)]
    points = curve.points()
    assert len(points) <= Curve.POINTS
    per = 1
    while len(finite) // per >= Curve.POINTS:
        per *= 2
    stretches = [finite[at : at + per] for at in range(0, len(finite), per)]
    assert points == pytest.approx([sum(one) / len(one) for one in stretches], abs=1e-3)


# ── the screen ──────────────────────────────────────────────────────────────────────────────


@given(
    st.sampled_from([0.0, 1e-3, 0.37, 1.0, 12.3456, 1e3]), st.sampled_from(["train", "tokenize"])
)
def test_the_picture_fits_80_columns_and_24_rows(scale: float, kind: str) -> None:
    console = Console(file=io.StringIO(), width=80, height=24)
    status = a_status(scale, kind=kind, elapsed_s=1e6 * scale)
    lines = console.render_lines(screen.picture(status, "stopped"), pad=False)
    assert len(lines) <= 24
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    for said in (status.verdict[:60], "cached", "reserved", "evicted", "tokenize", "restarts 2"):
        assert said in text
    assert not re.search("…(?!\n|$)", text)
    assert "…" not in text.partition("  xxx")[0]  # only notes are cut


def test_the_live_screen_leaves_the_terminal_as_it_was() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        shows = view.make_view("auto", stream)
        shows.update(a_status())
        shows.close()
        written = os.read(ours, 1 << 20).decode()
    os.close(ours)
    begin, end = written.index("\x1b[?1049h"), written.index("\x1b[?1049l")
    assert begin < written.index("tokenizers limit") < end
    assert "tokenizers limit" in written[end:]  # the last picture stays
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_plain_lines_become_rarer_and_name_what_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    plain = view.PlainView(out)
    for second in range(1, 7201):
        now[0] = float(second)
        plain.update(a_status())
        plain.event("info", "step_done", **a_status().metrics)
    plain.close()
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert 400 < len(steps) < 500  # 29 in a minute, then 354 in an hour, then 60
    assert 0.05 < sum(line.startswith("verdict | tokenizers") for line in lines) / len(steps) < 0.2


def test_json_lines_hold_events_and_the_last_status() -> None:
    out = io.StringIO()
    lines = view.make_view("json", out)
    lines.event("info", "resuming", tokens=5)
    lines.event("debug", "worker_started", who="x")
    lines.update(a_status())
    lines.update(a_status(step=6))
    lines.close()
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said[0] == {"event": "resuming", "level": "info", "tokens": 5}
    assert [one["status"]["step"] for one in said[1:]][-1] == 6


# ── the file ────────────────────────────────────────────────────────────────────────────────


def recorded(
    writer: Writer | None = None, ended: Ended | None = None, age_s: float = 0
) -> Recorded:
    return Recorded(writer or status_file.this_process(), time.time() - age_s, a_status(), ended)


def test_the_living_are_told_from_the_dead() -> None:
    me = status_file.this_process()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    began = psutil.Process(gone.pid).create_time()
    gone.wait()
    far = Writer("another-host", me.pid, me.started_s)
    cases = [
        (recorded(), "running", 0),
        (recorded(age_s=60), "silent", 6),
        (recorded(Writer(me.host, gone.pid, began)), "dead", 6),
        (recorded(Writer(me.host, me.pid, me.started_s - 50)), "dead", 6),  # its number was reused
        (recorded(far), "running", 0),
        (recorded(far, age_s=60), "silent", 6),
        (recorded(ended=Ended(0)), "done", 0),
        (recorded(ended=Ended(75)), "stopped", 75),
        (recorded(ended=Ended(5, "no network")), "failed", 5),
    ]
    for one, state, code in cases:
        assert (status_file.state(one), exit_code(one)) == (state, code)


def test_the_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    first = recorded()
    status_file.write(tmp_path, first)
    assert status_file.read(tmp_path) == first
    (tmp_path / f"{status_file.FILE}.partial").mkdir()  # it cannot be written
    status_file.write(tmp_path, recorded(ended=Ended(0)))
    assert status_file.read(tmp_path) == first
    (tmp_path / f"{status_file.FILE}.partial").rmdir()
    huge = msgspec.structs.replace(a_status(), notes=("x" * status_file.MAX_BYTES,))
    status_file.write(tmp_path, Recorded(first.writer, 0, huge))
    assert status_file.read(tmp_path) == first
    assert 2 * status_file.MAX_BYTES < 1 << 18
    (tmp_path / status_file.FILE).write_text('{"writer": 1}')
    with pytest.raises(ConfigError, match="cannot be read"):
        status_file.read(tmp_path)


# ── a real run, and a real client ───────────────────────────────────────────────────────────


def until(condition: Callable[[], Any], limit_s: float = 30.0) -> Any:
    """Wait for something; the limit is a failure."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def fetch(url: str, **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=10
        ) as got:
            return got.status, got.headers["Content-Type"], got.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def _answers(url: str) -> bool:
    try:
        return fetch(url)[0] == 200
    except OSError:
        return False


def test_a_run_is_seen_from_elsewhere_until_it_is_killed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(60), 3, "jsonl.zst")
    one = job(tmp_path, shards, logging={"http_port": 0})
    held = tmp_path / "held"
    process = start(tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:3:{held}")
    folder = tmp_path / "run"
    try:
        until(held.exists)
        url = until(lambda: _url(folder))
        _look_by_http(url)
        seen = call(PROGRAM, "status", folder, "--json")
        assert seen.returncode == 0, seen.stderr
        said = json.loads(seen.stdout)
        assert (said["state"], said["writer"]["pid"]) == ("running", process.pid)
        children = psutil.Process(process.pid).children()
        assert any("pipeline.web" in child.cmdline() for child in children)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    until(lambda: not _answers(url))  # the server ends with its supervisor
    dead = call(PROGRAM, "status", folder)
    assert dead.returncode == 6
    assert "was killed; the same command resumes" in dead.stdout
    psutil.wait_procs(children, timeout=5)


def _url(folder: Path) -> str | None:
    try:
        return status_file.read(folder).status.url
    except ConfigError:
        return None


def _look_by_http(url: str) -> None:
    """What a browser and Prometheus get."""
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    silent = socket.create_connection((host, int(port)))  # a client that never asks
    status, kind, page = fetch(url)
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert '<script src="live.js">' in page
    assert "decompress" in fetch(f"{url}fragment")[2]
    assert fetch(f"{url}live.js")[1].startswith("text/javascript")
    assert json.loads(fetch(f"{url}status.json")[2])["state"] == "running"
    families = {one.name: one for one in text_string_to_metric_families(fetch(f"{url}metrics")[2])}
    assert {"fineweb_disk_bytes", "fineweb_stage_busy", "fineweb_restarts"} <= set(families)
    budget = families["fineweb_disk_budget_bytes"].samples[0].value
    assert budget == 1e8
    states = {one.labels["state"]: one.value for one in families["fineweb_run_state"].samples}
    assert states["running"] == 1
    assert sum(states.values()) == 1
    assert fetch(url, Host="evil.example")[0] == 403
    assert fetch(url, Host=f"localhost:{port}")[0] == 200
    assert fetch(f"{url}log.txt")[0] == 404
    asks = http.client.HTTPConnection(host, int(port), timeout=10)
    asks.request("POST", "/")
    assert asks.getresponse().status == 501
    silent.close()


def test_the_page_is_whole_shows_names_as_text_and_loads_nothing_from_elsewhere() -> None:
    """As a parser sees it; by hand it was looked at in Chromium, which a bare machine lacks."""
    evil = "<script>alert(1)</script>"
    status = a_status(name=evil, notes=(evil,), verdict=evil)
    page = live_page.page(msgspec.structs.replace(recorded(), status=status))
    seen = Page()
    seen.feed(page)
    assert seen.scripts == ["live.js"]
    assert not seen.foreign
    assert seen.open == ["html"] or not seen.open
    assert seen.data.count(evil) == 4  # title, headline, verdict, note


class Page(HTMLParser):
    """What a page holds: its scripts, addresses of elsewhere, text, and elements left open."""

    _MAY_STAY_OPEN = frozenset({"meta", "td", "th", "tr", "html", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str | None] = []
        self.foreign: list[str] = []
        self.open: list[str] = []
        self.data = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append(dict(attrs).get("src"))
        self.foreign += [said for name, said in attrs if name in ("src", "href") and said
                         and "//" in said]  # fmt: skip
        if tag not in self._MAY_STAY_OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._MAY_STAY_OPEN:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data += data


def test_a_run_that_ends_says_how_and_a_port_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(20), 2, "jsonl.zst")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused, _ = finish(start(tmp_path, job(tmp_path, shards, logging={"http_port": port})))
        assert f"port {port}" in refused["what"]
    outcome, _ = finish(start(tmp_path, job(tmp_path, shards)))
    assert "limit" in outcome["summary"]["verdict"] or "bound" in outcome["summary"]["verdict"]
    done = call(PROGRAM, "status", tmp_path / "run", "--watch", "--json")
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["state"] == "done"
    listed = call(PROGRAM, "status", "--runs-dir", tmp_path)
    assert "done" in listed.stdout
    assert f"{outcome['summary']['tokens']:,} tokens" in listed.stdout
