"""Processes that stop, hang, grow, or lose their terminal; two runs that want one folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import cache, messages, spawn, watch
from pipeline.channel import Channel
from pipeline.config import Stream
from pipeline.errors import CacheInUseError
from pipeline.watch import RunningTime, Watch
from tests.harness import (
    ROOT,
    descendants,
    english,
    events,
    finish,
    job,
    run,
    start,
    wait_for_event,
    write_shards,
)
from tests.servers import Behaviour, eventually, http_server

DOCUMENTS = english(120)
CLI = [sys.executable, "-c", "from pipeline.cli import main; main()"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), DOCUMENTS, 4, "jsonl.zst")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, shards: list[Path]) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    return str(run(folder, job(folder, shards))["sha256"])


@contextlib.contextmanager
def slow_run(
    folder: Path, shards: list[Path], **changes: object
) -> Iterator[subprocess.Popen[str]]:
    """A run that lasts some seconds, because its server does; it is killed if the test forgets."""
    with http_server(shards[0].parent, Behaviour(bytes_per_s=150_000)) as url:
        urls = [f"{url}/{path.name}" for path in shards]
        process = start(folder, job(folder, urls, fetchers=1, **changes))
        try:
            for _ in wait_for_event(process, "consumer_ready"):
                pass
            yield process
        finally:
            process.kill()
            process.wait()


def by_role(pid: int) -> dict[str, psutil.Process]:
    """The last started worker of every role."""
    found = {}
    for child in descendants(pid):
        with contextlib.suppress(psutil.Error):
            found[child.cmdline()[3]] = child
    return found


# ── stop and continue ───────────────────────────────────────────────────────────────────────


def test_stop_and_continue_of_every_role_costs_nothing(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    with slow_run(tmp_path, shards) as process:
        for role in ("fetcher", "decompressor", "tokenizer", "writer"):
            one = by_role(process.pid)[role]
            one.suspend()
            time.sleep(0.3)
            one.resume()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        outcome, err = finish(process)
    assert outcome["summary"]["sha256"] == expected, err
    assert outcome["summary"]["restarts"] == 0


def test_a_machine_that_slept_does_not_blame_its_workers(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    """Everything is stopped for longer than hang_s, then the supervisor goes on first."""
    with slow_run(tmp_path, shards, hang_s=2.0) as process:
        everybody = [psutil.Process(process.pid), *descendants(process.pid)]
        for one in reversed(everybody):
            one.suspend()
        time.sleep(3.0)
        everybody[0].resume()
        time.sleep(0.5)
        for one in everybody[1:]:
            one.resume()
        outcome, err = finish(process)
    assert outcome["summary"]["sha256"] == expected
    assert outcome["summary"]["restarts"] == 0, events(err, "worker_killed")


def test_the_running_clock_leaves_out_absences(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    clock = RunningTime()
    begin = clock()
    for step_s in (0.25, 1.0, 500.0, 0.25):  # 500 s: it was stopped
        now += step_s
        clock()
    assert clock() - begin == pytest.approx(1.5)


# ── hangs ───────────────────────────────────────────────────────────────────────────────────


def test_workers_that_hang_are_found_and_replaced(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    """One of each role at work, and one that never gets as far as its first message."""
    with http_server(shards[0].parent) as url:
        urls = [f"{url}/{path.name}" for path in shards]
        points = {
            "fetcher": "fetcher:mid_write:1",
            "decompressor": "decompressor:mid_block:2",
            "tokenizer": "tokenizer:mid_place:3",
            "writer": "writer:after_write:4",
        }
        plans = [f"hang:{role}:{p}:{tmp_path / role}" for role, p in points.items()]
        plans.append(f"hang:tokenizer:before_send:Hello:1:{tmp_path / 'newborn'}")
        process = start(
            tmp_path,
            job(tmp_path, urls, hang_s=3.0, consumer_hang_s=5.0),
            FINEWEB_FAULT=";".join(plans),
        )
        outcome, err = finish(process)
    assert all((tmp_path / mark).exists() for mark in (*points, "newborn"))
    assert outcome["summary"]["sha256"] == expected
    reasons = [line["reason"] for line in events(err, "worker_killed")]
    assert sum("at start" in reason for reason in reasons) >= 1
    assert sum("with work" in reason for reason in reasons) >= 4
    assert len(events(err, "writer_died")) >= 1


def test_work_that_says_it_goes_on_is_not_silent() -> None:
    """`working` sends once a second at most; the message alone moves the deadline."""
    import socket

    ours, theirs = socket.socketpair()
    worker, supervisor = Channel(theirs), spawn.SupervisorChannel(ours)
    for _ in range(1000):
        worker.working()
    assert supervisor.receive() == ([messages.Working()], False)
    child = spawn.Child("consumer", "writer", None, supervisor, heard=0.0, ready=True)  # type: ignore[arg-type]
    rules = Watch(Stream(hang_s=10.0, consumer_hang_s=20.0))
    assert rules.silent(child, now=20.0) is None
    assert "consumer_hang_s" in (rules.silent(child, now=21.0) or "")
    child.ready = False
    assert rules.silent(child, now=10.0) is None
    assert "hang_s" in (rules.silent(child, now=11.0) or "")


# ── memory ──────────────────────────────────────────────────────────────────────────────────


def test_a_worker_that_takes_too_much_memory_is_replaced(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    mark = tmp_path / "grown"
    process = start(
        tmp_path,
        job(tmp_path, shards, worker_memory_gb=0.5),
        FINEWEB_FAULT=f"memory:tokenizer:tokenizer:before_encode:3:{mark}",
    )
    outcome, err = finish(process)
    assert mark.exists()
    assert outcome["summary"]["sha256"] == expected
    assert outcome["summary"]["restarts"] == 1
    (killed,) = events(err, "worker_killed")
    assert "GB of memory, more than 0.50 GB (worker_memory_gb)" in killed["reason"]


def test_a_block_that_takes_all_memory_three_times_ends_the_run_by_name(
    tmp_path: Path, shards: list[Path]
) -> None:
    plans = [
        f"memory:tokenizer:tokenizer:before_encode:1:{tmp_path / f'grown-{n}'}" for n in range(3)
    ]
    one = job(tmp_path, shards, workers=1, worker_memory_gb=0.4)
    process = start(tmp_path, one, FINEWEB_FAULT=";".join(plans))
    outcome, _ = finish(process)
    assert process.returncode == 3
    assert "shard-00000.jsonl.zst: encoding block 0 has killed 3 tokenizers" in outcome["what"]


def test_the_limit_is_a_part_of_what_there_is() -> None:
    assert watch.memory_limit_bytes(2.5) == 2_500_000_000
    assert (
        1 << 30
        <= watch.memory_limit_bytes(None)
        <= max(1 << 30, psutil.virtual_memory().total // 4)
    )
    assert 0 < watch.memory_bytes(os.getpid()) < 10e9


def test_running_out_of_memory_is_a_death_and_no_bug() -> None:
    """MemoryError in a worker: SIGKILL, as the kernel would, and no Failed that ends the run."""
    import socket

    ours, theirs = socket.socketpair()
    code = (
        "import sys, pipeline.child as c, types; m = types.ModuleType('big');"
        "m.main = lambda channel, fds: bytearray(1 << 62);"
        "sys.modules['big'] = m; c.ROLES['fetcher'] = 'big';"
        f"sys.argv = ['x', 'fetcher', '{theirs.fileno()}', '-1', '-1']; c.main()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], cwd=ROOT)
    theirs.close()
    assert child.wait(20) == -signal.SIGKILL
    received, gone = spawn.SupervisorChannel(ours).receive()
    assert [type(message) for message in received] == [messages.Hello]
    assert gone


# ── signals and terminals ───────────────────────────────────────────────────────────────────


class Terminal:
    """A run of `tokenize` on a terminal of its own."""

    def __init__(self, folder: Path, urls: list[str]) -> None:
        shards = [word for url in urls for word in ("--shards", url)]
        arguments = [*CLI, "tokenize", *shards, "--out", str(folder / "out"), "--fetchers", "1"]
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, arguments)
        os.set_blocking(self._terminal, False)
        log = folder / "out" / "log.txt"
        eventually(lambda: bool(self.read()) or log.exists(), 60)
        eventually(lambda: log.exists() and "consumer_ready" in log.read_text(), 60)

    def read(self) -> bytes:
        """What has been shown; keeps the terminal from filling up."""
        with contextlib.suppress(BlockingIOError, OSError):
            return os.read(self._terminal, 1 << 16)
        return b""

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def close(self) -> None:
        os.close(self._terminal)

    def exit_code(self) -> int:
        found: list[int] = []

        def ended() -> bool:
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                found.append(os.waitstatus_to_exitcode(status))
            return bool(pid)

        eventually(ended, 40)
        return found[0]


@pytest.mark.parametrize("how", ["closed", "ctrl-c"])
def test_a_terminal_that_is_closed_or_interrupts_stops_the_run_cleanly(
    tmp_path: Path, shards: list[Path], expected: str, how: str
) -> None:
    with http_server(shards[0].parent, Behaviour(bytes_per_s=20_000)) as url:
        urls = [f"{url}/{path.name}" for path in shards]
        terminal = Terminal(tmp_path, urls)
        family = descendants(terminal.pid)
        assert len(family) >= 4
        if how == "closed":
            terminal.close()
        else:
            terminal.type(b"\x03")
        assert terminal.exit_code() == 75
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    assert (tmp_path / "out" / "writer.json").exists()


def test_sigterm_to_every_process_is_a_clean_stop(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    """As systemd and Slurm do it: workers leave the decision to their supervisor, also those that
    have only just been started."""
    with slow_run(tmp_path, shards) as process:
        for one in [*descendants(process.pid), psutil.Process(process.pid)]:
            one.terminate()
        outcome, err = finish(process)
        assert process.returncode == 75, err
        assert not events(err, "worker_died") + events(err, "writer_died")
        assert outcome["summary"]["restarts"] == 0


def test_what_nohup_switched_off_stays_off(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        with slow_run(tmp_path, shards) as process:
            process.send_signal(signal.SIGHUP)
            outcome, err = finish(process)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 0, err
    assert outcome["summary"]["sha256"] == expected


# ── one owner ───────────────────────────────────────────────────────────────────────────────


def test_a_killed_supervisor_takes_even_a_stopped_worker_along(
    tmp_path: Path, shards: list[Path], expected: str
) -> None:
    if sys.platform != "linux":
        pytest.skip(
            "elsewhere a stopped worker ends when it is continued; the lock holds till then"
        )
    one = job(tmp_path, shards)
    held = tmp_path / "held"
    process = start(tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:3:{held}")
    eventually(held.exists, 60)
    family = descendants(process.pid)
    assert len(family) >= 5
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert run(tmp_path, one)["sha256"] == expected


def test_a_folder_is_refused_with_the_pid_while_its_run_goes_on(
    tmp_path: Path, shards: list[Path]
) -> None:
    """The cache folder and the run's own folder, each with another of the other kind."""
    one = job(tmp_path, shards)
    held = tmp_path / "held"
    process = start(tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:3:{held}")
    eventually(held.exists, 60)
    for other in (
        {"run_dir": str(tmp_path / "other"), "cache_dir": one.cache_dir},
        {"run_dir": one.run_dir, "cache_dir": str(tmp_path / "other")},
    ):
        changed = type(one)(one.kind, one.config, **other)
        refused = start(tmp_path / "second", changed)
        outcome, _ = finish(refused)
        assert refused.returncode == 4
        assert f"process {process.pid}" in outcome["what"]
    process.kill()
    process.communicate()


def test_a_folder_stays_owned_until_the_last_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that is dead, and a child that still holds the lock: refused, then free."""
    monkeypatch.setattr(cache, "_LINGER_S", 0.3)
    code = (
        "import subprocess, sys, pathlib; from pipeline import cache\n"
        f"with cache.own(pathlib.Path({str(tmp_path)!r})) as fd:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=[fd], stdout=-3, stderr=-3)\n"
        "    print(child.pid, flush=True)"
    )
    owner = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    child = psutil.Process(int(owner.stdout))
    said = r"has ended \(process \d+\), but one of its workers has not"
    with pytest.raises(CacheInUseError, match=said), cache.own(tmp_path):
        raise AssertionError("it is not free")
    child.kill()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    with cache.own(tmp_path) as descriptor:
        with pytest.raises(BlockingIOError), (tmp_path / cache.LOCK_FILE).open() as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert descriptor > 0
