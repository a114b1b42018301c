"""Several ranks: one stream, one model, and one end, whoever is lost.

Real processes and MLX's ring on the loopback address; every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from pipeline import config, launch, meeting, ranks
from pipeline.channel import Channel, frame
from pipeline.config import to_plain
from pipeline.errors import ConfigError, ExitCode, FinewebError, PeerLostError
from pipeline.messages import Counts, Cursor, LaneCursor, LaneEnded, RingLayout, Skip, SlotPublished
from pipeline.ranks import Rank, Share
from pipeline.turns import Group
from shm import ring
from tests.harness import ROOT, descendants, english, write_shards
from tests.training_jobs import training
from trainer import team
from trainer.feed import Feed, StopWanted

T = 4
STEPS = 50
ENDS_S = 30.0  # the bound on the end of a job that has lost a rank


# ── pure: whose lanes, which cursor ─────────────────────────────────────────────────────────


@given(st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (6, 3)]), st.data())
@settings(max_examples=60, deadline=None)
def test_the_parts_of_a_cursor_are_the_whole(shape: tuple[int, int], data: st.DataObject) -> None:
    lanes, size = shape
    number = st.integers(0, 99)
    whole = Cursor(
        "print",
        {"shards": "8"},
        tuple(LaneCursor(*(data.draw(number) for _ in range(4))) for _ in range(lanes)),
        Counts(*(data.draw(number) for _ in range(5))),
        tuple(Skip(data.draw(st.integers(0, lanes - 1)), n, 0, True, "") for n in range(3)),
    )
    shares = [Share(lanes, Rank(number, size)) for number in range(size)]
    merged = ranks.merged([share.cursor(whole) for share in shares])
    assert sorted(merged.skips, key=lambda skip: skip.sequence) == list(whole.skips)
    assert msgspec.structs.replace(merged, skips=()) == msgspec.structs.replace(whole, skips=())


def test_ranks_that_cannot_share_the_lanes_are_told_which_can() -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share 8 lanes") as caught:
        Share(8, Rank(0, 3))
    assert "1, 2, 4, 8 ranks, or 9 lanes" in caught.value.remedy


def test_a_launchers_environment_says_rank_size_and_meeting(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5001"]]')
    of = ranks.of_environment
    assert of({}, None) == Rank()
    assert of({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}, None) == Rank(1, 2, "10.0.0.1:6000")
    nccl = {"MLX_RANK": "2", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "h", "NCCL_PORT": "12345"}
    assert of(nccl, None) == Rank(2, 4, "h:13345")
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert of(mpi, "h:7") == Rank(1, 2, "h:7")
    with pytest.raises(ConfigError, match="rank 1 of 2, and nothing says where"):
        of(mpi, None)


def test_a_hostfile_is_mlxs_own(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(
        '{"backend": "ring", "envs": ["A=b"], "hosts": [{"ssh": "m1", "ips": ["1.2.3.4"], '
        '"rdma": [null]}, {"ssh": "m2", "ips": []}]}'
    )
    found = launch.layout(None, str(path), "auto", 32300, 2)
    assert found is not None
    assert [place.ssh for place in found.places] == ["m1", "m2"]
    assert (found.backend, found.environment) == ("ring", {"A": "b"})
    with pytest.raises(ConfigError, match="no ips for m2"):
        _ = found.places[1].ip
    path.write_text('{"hosts": [{"ssh": "m1"}], "backend": "jaccl"}')
    with pytest.raises(ConfigError, match="MLX's own launcher"):
        launch.layout(None, str(path), "auto", 32300, 0)
    path.write_text('[{"host": 1}]')
    with pytest.raises(ConfigError, match="is no hostfile"):
        launch.layout(None, str(path), "auto", 32300, 0)


# ── the feeds of several ranks are one ──────────────────────────────────────────────────────


class _Table:
    """Ranks' messages, exchanged between threads as mx.distributed does between processes."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=20)
        self._parts: list[bytes] = [b""] * size

    def exchange(self, number: int) -> Callable[[bytes], list[bytes]]:
        def one(mine: bytes) -> list[bytes]:
            self._parts[number] = mine
            self._barrier.wait()
            said = list(self._parts)
            self._barrier.wait()
            return said

        return one


def feed(streams: list[np.ndarray], groups: tuple[Group, ...], number: int, size: int,
         exchange: Callable[[bytes], list[bytes]], keep: list[Any]) -> Feed:  # fmt: skip
    """One rank's feed, with all of its lanes in the ring and their ends known from the first."""
    owned = range(number, len(streams), size)
    C = 2 * T
    slots = max(-(-len(stream) // C) for stream in streams) + 1
    shape = RingLayout(len(owned), slots, C, 2)
    tokens = ring.Ring(bytearray(ring.size_bytes(shape)), shape)
    ours, theirs = socket.socketpair()
    keep += [ours, theirs]
    for local, lane in enumerate(owned):
        stream = streams[lane]
        tokens.place(local, 0, stream)
        for slot in range(-(-len(stream) // C)):
            end = min((slot + 1) * C + 1, len(stream))
            theirs.sendall(frame(SlotPublished(local, slot, end)))
        theirs.sendall(frame(LaneEnded(local, len(stream))))
    return Feed(Channel(ours), tokens, (0,) * len(streams), T, groups, owned, exchange)


def everything(one: Feed, count: int) -> list[tuple[str, list[list[int]], list[int]]]:
    """Hash, own rows and all positions of every update up to the end of the stream."""
    found = []
    while (rows := one.take(count, lambda window: window.tolist())) is not None:
        found.append((one.batch_hash, rows, list(one.positions)))
    return found


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_ranks_take_the_windows_of_one_feed_whichever_lane_ends_when(data: st.DataObject) -> None:
    """Lanes of any length, one data set or two by weight: every batch has the same hash, its rows
    are shared out without gap or repeat, and all ranks see the stream end at the same update."""
    size = data.draw(st.sampled_from([2, 4]))
    lanes = size * data.draw(st.integers(1, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    streams = [rng.integers(0, 999, data.draw(st.integers(1, 30)), dtype=np.uint16)
               for _ in range(lanes)]  # fmt: skip
    cut = data.draw(st.integers(1, lanes))
    groups = (Group("a", 0, cut, 2), Group("b", cut, lanes - cut, 1))[: 1 if cut == lanes else 2]
    count = data.draw(st.integers(1, 9))
    keep: list[Any] = []
    whole = everything(feed(streams, groups, 0, 1, lambda mine: [mine], keep), count)
    table = _Table(size)
    results: list[Any] = [None] * size

    def run(number: int) -> None:
        one = feed(streams, groups, number, size, table.exchange(number), keep)
        results[number] = everything(one, count)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for sock in keep:
        sock.close()
    assert all(len(result) == len(whole) for result in results)
    for update, (digest, rows, positions) in enumerate(whole):
        parts = [result[update] for result in results]
        assert all((part[0], part[2]) == (digest, positions) for part in parts)
        assert sorted(itertools.chain(*(part[1] for part in parts))) == sorted(rows)


def test_one_rank_that_stops_stops_all_before_anything_is_taken() -> None:
    streams = [np.arange(40, dtype=np.uint16)] * 2
    table, keep, stopped = _Table(2), [], []  # type: ignore[var-annotated]

    def run(number: int) -> None:
        one = feed(streams, (), number, 2, table.exchange(number), keep)
        one.take(2, np.copy)
        if number:
            one.deadline_s = 0.0
        with pytest.raises(StopWanted):
            one.take(2, np.copy)
        stopped.append(list(one.positions))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert stopped == [[T, T], [T, T]]


def test_a_message_of_an_earlier_exchange_is_a_lost_rank() -> None:
    """What MLX's ring has been seen to return when a rank had died: the memory of before."""
    alone = team.Team()
    for data in (b"", b"one", bytes(9000)):  # the last one takes a larger frame
        assert alone.exchange(data) == [data]
    header = team._HEADER
    stale = np.zeros(header.size + 9000, np.uint8)
    good = xxh3_64_intdigest(b"ab")
    for exchange, digest, fits in ((3, good, True), (2, good, False), (3, 7, False)):
        raw = header.pack(2, exchange, digest) + b"ab"
        stale[: len(raw)] = np.frombuffer(raw, np.uint8)
        if fits:
            assert alone._opened(stale) == (2, b"ab")
        else:
            with pytest.raises(PeerLostError, match="not what its sender has sent"):
                alone._opened(stale)


# ── the meeting ─────────────────────────────────────────────────────────────────────────────


def test_ranks_meet_a_stranger_is_not_let_in_and_a_loss_is_named() -> None:
    (port,) = launch.free_ports(1)
    waits = config.Ranks(start_s=20, timeout_s=5)
    said: list[Any] = [None] * 3
    all_said = threading.Barrier(3, timeout=20)

    def run(number: int, key: str) -> None:
        one = meeting.Meeting(Rank(number, 3, f"127.0.0.1:{port}", key), waits, lambda: 0)
        try:
            one.open()
            said[number] = one.gather(str(number).encode())
            assert one.on_this_host == 3
            all_said.wait()
            if number == 1:
                one.leave(settled=False, why="its disk is full")
                return
            until = time.monotonic() + 10
            while time.monotonic() < until:
                one.check()
                time.sleep(0.01)
        except FinewebError as error:
            said[number] = said[number], error

    threads = [threading.Thread(target=run, args=(number, "key")) for number in range(2)]
    stranger = threading.Thread(target=run, args=(2, "other"), daemon=True)
    stranger.start()
    for thread in threads:
        thread.start()
    stranger.join(10)  # shut out, and told so by the end of its connection
    threads.append(threading.Thread(target=run, args=(2, "key")))
    threads[-1].start()
    for thread in threads:
        thread.join(20)
    whole = (b"0", b"1", b"2")
    assert said[1] == whole
    for number in (0, 2):
        assert said[number][0] == whole
        assert isinstance(said[number][1], PeerLostError)
        assert "rank 1" in said[number][1].what
        assert "its disk is full" in said[number][1].what


def test_a_rank_that_would_train_something_else_is_refused() -> None:
    (port,) = launch.free_ports(1)
    found: list[Any] = [None, None]
    cursor = Cursor("print", {}, (LaneCursor(1, 2, 3, 4),))

    def run(number: int, one: config.Config) -> None:
        place = Rank(number, 2, f"127.0.0.1:{port}")
        try:
            with meeting.of(place, config.Ranks(start_s=20), lambda: 0) as others:
                found[number] = meeting.agreed(others, one, {}, None if number else cursor)
                others.gather(b"")
        except FinewebError as error:
            found[number] = found[number], error

    both = [
        msgspec.convert({"name": "x", "training": {"optimization": {"momentum": m}}}, config.Config)
        for m in (0.9, 0.95)
    ]
    threads = [threading.Thread(target=run, args=one) for one in enumerate(both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert isinstance(found[1][1], ConfigError)
    assert "another configuration than rank 0: training" in found[1][1].what
    assert found[0][0] == cursor
    assert isinstance(found[0][1], PeerLostError)
    assert "another configuration" in found[0][1].what


def test_a_rank_that_does_not_come_is_named() -> None:
    (port,) = launch.free_ports(1)
    one = meeting.Meeting(Rank(0, 3, f"127.0.0.1:{port}"), config.Ranks(start_s=0.3), lambda: 0)
    with pytest.raises(PeerLostError, match="these are missing: 1, 2"):
        one.open()


# ── real ranks ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("ranks"), english(160), 8, "jsonl.zst")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a test that failed has left running ends with it."""
    yield
    for process in descendants(os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Job:
    """A configuration file and the runs that are made with it."""

    def __init__(self, folder: Path, shards: list[Path], **steps: int) -> None:
        plain = to_plain(training(folder, shards, lanes=8, workers=1, fetchers=1).config)
        plain["name"], plain["logging"]["runs_dir"] = "run", str(folder)
        plain["logging"]["steps"].update(steps)
        plain["logging"]["keep_checkpoints"] = 99
        plain["training"]["scheduler"]["type"] = "constant"  # whatever --steps says
        plain["data"]["stream"] |= {"decompressors": 1, "max_disk_gb": 1.0}
        plain["ranks"]["timeout_s"] = 5.0
        self.folder, self.run_dir, self.path = folder, folder / "run", folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(plain))

    def start(self, steps: int, *options: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", "start",
                   "--config", str(self.path), "--steps", str(steps), "--json",
                   "--progress", "json", *options]  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | threads | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, steps: int, *options: str, **environment: str) -> dict[str, Any]:
        process = self.start(steps, *options, **environment)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err[-3000:]
        return dict(json.loads(out.splitlines()[-1]))

    def updates(self) -> dict[int, tuple[str, float]]:
        """Hash and loss of every update; one that was done again must have had the same batch."""
        found: dict[int, tuple[str, float]] = {}
        for line in (self.run_dir / "metrics.jsonl").read_text().splitlines():
            one = json.loads(line)
            before = found.setdefault(one["step"], (one["batch_hash"], one["loss"]))
            assert before[0] == one["batch_hash"], f"step {one['step']} differs"
        return found

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        names = [path.name for path in (self.run_dir / "checkpoints").glob("step-????????")]
        return max((int(name[5:]) for name in names), default=0)


def events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Events as they come; the test's limit bounds the wait."""
    assert process.stderr is not None
    for line in process.stderr:
        yield json.loads(line) if line.startswith("{") else {"event": line}


def until(told: Iterator[dict[str, Any]], name: str) -> dict[str, Any]:
    """The first event of a name; of step_done, what the status shows of it."""
    last: list[dict[str, Any]] = []
    for event in told:
        if event.get("event") == name:
            return event
        if name == "step_done" and event.get("status", {}).get("step"):
            return event
        last = [*last[-20:], event] if "event" in event else last
    raise AssertionError(f"the run ended without {name}, after {last}")


def rank_processes(pid: int) -> list[psutil.Process]:
    """The ranks' supervisors, in their order."""
    return [one for one in psutil.Process(pid).children() if "pipeline.rank_process" in
            one.cmdline()]  # fmt: skip


def all_end(processes: list[psutil.Process], within_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    assert not alive, f"still there: {[' '.join(one.cmdline()[:5]) for one in alive]}"


@pytest.mark.timeout(240)
def test_one_two_and_four_ranks_are_one_run(tmp_path: Path, shards: list[Path]) -> None:
    """Elastic: 1 rank, then 2, 4 and 1 again from the checkpoints of the others: the same SHA-256
    of every batch as without a stop on one rank, and the same loss to rounding."""
    for name in ("whole", "elastic"):
        (tmp_path / name).mkdir()
    whole = Job(tmp_path / "whole", shards, checkpoint_interval=8)
    whole.run(STEPS)
    one = whole.updates()
    elastic = Job(tmp_path / "elastic", shards, checkpoint_interval=100)
    first = Path("checkpoints") / "step-00000008"
    shutil.copytree(whole.run_dir / first, elastic.run_dir / first)
    assert elastic.run(44, "-n", "2")["steps"] == 44
    assert elastic.run(47, "-n", "4")["steps"] == 47
    assert elastic.run(STEPS)["steps"] == STEPS
    many = elastic.updates()
    assert list(many) == list(range(9, STEPS + 1))
    for step, (digest, loss) in many.items():
        assert digest == one[step][0], f"update {step} was trained on other rows"
        assert loss == pytest.approx(one[step][1], rel=2e-5), f"update {step}"
    records = [json.loads(line) for line in
               (elastic.run_dir / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert all(record["all_reduce_bytes"] > 100_000 for record in records[:-4])
    for log in (elastic.run_dir / "log.txt", elastic.run_dir / "ranks" / "3" / "log.txt"):
        assert "ranks_differed" not in log.read_text()


@pytest.mark.timeout(240)
def test_a_killed_rank_ends_all_and_max_restarts_brings_the_run_home(
    tmp_path: Path, shards: list[Path]
) -> None:
    job = Job(tmp_path, shards, checkpoint_interval=4)
    process = job.start(100_000, "-n", "2", "--max-restarts", "1")
    told = events(process)
    until(told, "checkpoint_written")
    first = rank_processes(process.pid)
    below = [one for rank in first for one in descendants(rank.pid)]
    assert len(first) == 2
    first[1].kill()
    begin = time.monotonic()
    again = until(told, "ranks_started_again")
    assert time.monotonic() - begin < ENDS_S
    assert "rank 1" in again["why"]
    all_end([*first, *below], 2.0)
    until(told, "checkpoint_written")
    process.send_signal(signal.SIGTERM)  # a clean stop: nobody waits alone, all is saved
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.RESUME, err[-2000:]
    assert job.saved() == max(job.updates())

    process = job.start(100_000, "-n", "2")  # nobody starts again what was not asked for
    until(events(process), "step_done")
    trainer = next(one for one in descendants(rank_processes(process.pid)[0].pid)
                   if "trainer" in one.cmdline())  # fmt: skip
    every = descendants(process.pid)
    trainer.kill()
    begin = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.RESUME, err[-2000:]
    assert time.monotonic() - begin < ENDS_S
    assert "the trainer of rank 0 died by signal 9" in err
    all_end(every, 2.0)


@pytest.mark.timeout(120)
def test_no_rank_outlives_its_launcher(tmp_path: Path, shards: list[Path]) -> None:
    """kill -9 of the launcher: the ranks stop as if asked to, with a checkpoint. One of them runs
    through a stand-in for ssh, which is all that is between it and the launcher."""
    job = Job(tmp_path, shards, checkpoint_interval=1000)
    process = job.start(100_000, *two_hosts(tmp_path), PATH=path_with_ssh(tmp_path))
    until(events(process), "step_done")
    every = descendants(process.pid)
    assert len(every) > 8
    process.kill()
    all_end(every, ENDS_S)
    assert job.saved() == max(job.updates())


@pytest.mark.timeout(120)
def test_without_a_host_that_is_gone_the_others_go_on(tmp_path: Path, shards: list[Path]) -> None:
    """Its rank is killed, and ssh does not reach it any more: one rank goes on with all lanes."""
    job = Job(tmp_path, shards, checkpoint_interval=4)
    process = job.start(
        100_000, *two_hosts(tmp_path), "--max-restarts", "1", PATH=path_with_ssh(tmp_path)
    )
    told = events(process)
    until(told, "checkpoint_written")
    (tmp_path / "gone").touch()
    both = [one for one in descendants(process.pid) if "pipeline.rank_process" in one.cmdline()]
    max(both, key=lambda one: one.pid).kill()  # started second
    again = until(told, "ranks_started_again")
    assert again["ranks"] == 1
    assert "rank 1 (other-host)" in again["why"]
    until(told, "checkpoint_written")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.RESUME, err[-2000:]
    updates = job.updates()
    assert job.saved() == max(updates)
    (tmp_path / "alone").mkdir()
    alone = Job(tmp_path / "alone", shards, checkpoint_interval=1000)
    alone.run(max(updates))
    expected = alone.updates()
    assert {step: one[0] for step, one in updates.items()} == {
        step: expected[step][0] for step in updates
    }


def path_with_ssh(folder: Path) -> str:
    """PATH on which ssh runs its command on this machine, until there is a file `gone`."""
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(
        f'#!/bin/sh\n[ -e "{folder}/gone" ] && exit 255\nfor last; do :; done\nexec sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def two_hosts(folder: Path) -> tuple[str, ...]:
    """Options for two ranks on this machine, one of them as if it were elsewhere."""
    hosts = folder / "hosts.json"
    hosts.write_text('[{"ssh": "localhost", "ips": ["127.0.0.1"]}, '
                     '{"ssh": "other-host", "ips": ["127.0.0.1"]}]')  # fmt: skip
    return "--hostfile", str(hosts), "--port", str(launch.free_ports(1)[0] // 2 + 16000)
