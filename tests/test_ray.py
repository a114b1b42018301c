"""`tokenize --ray`: the stream of one machine, whatever dies; a real Ray with two workers."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cache, on_ray, range_task, shard_ranges
from pipeline.catalog import Shard
from pipeline.cli import cli
from pipeline.errors import CacheInUseError, ConfigError, CursorMismatchError, ShardError
from pipeline.workers.writer import HEADER_BYTES
from tests import harness
from tests.servers import Behaviour, http_server

SCRIPTS = Path(sys.executable).parent
DOCUMENTS = harness.english(240, largest=9000)
NUM_SHARDS, PER_RANGE = 6, 2
# The cluster is this machine's alone; nothing is written into the user's home.
QUIET = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
CONFIG = """
name: tokens
data:
  preprocessing: {max_context_size: 64}
  stream: {writer_save_s: 0.05, block_bytes: 40000, slot_windows: 8}
"""


class World:
    """A cluster of two CPUs, shards behind a server that can be slow, and their true stream."""

    def __init__(self, folder: Path, address: str, url: str, how: Behaviour) -> None:
        self.folder, self.address, self.how = folder, address, how
        self.paths = harness.write_shards(folder / "served", DOCUMENTS, NUM_SHARDS, "jsonl.zst")
        self.urls = [f"{url}/{path.name}" for path in self.paths]
        sizes = [path.stat().st_size for path in self.paths]
        self.range_gb = PER_RANGE * min(sizes) / 1e9
        self.slowly = min(sizes) / 0.7
        (folder / "config.yaml").write_text(CONFIG)
        summary = harness.run(folder, harness.job(folder, self.paths))
        self.truth = {key: summary[key] for key in ("sha256", "tokens", "documents")}

    def arguments(self, out: Path, *more: str, address: str = "") -> list[str]:
        """Of the command, as a user gives it."""
        shards = [part for url in self.urls for part in ("--shards", url)]
        return [
            "tokenize", "--config", str(self.folder / "config.yaml"), "--out", str(out),
            "--ray", address or self.address, "--range-gb", f"{self.range_gb:.12f}",
            "--task-cpus", "1", "--max-disk", "0.4", "--cache-dir", str(out.parent / "cache"),
            *(more or shards), "--json", "--plain",
        ]  # fmt: skip

    def holds(self, result: dict[str, Any], out: Path) -> None:
        """The result is the truth, and so are the files."""
        assert {key: result[key] for key in self.truth} == self.truth
        files = sorted(out.glob("range-*/tokens_*.bin"))
        body = b"".join(file.read_bytes()[HEADER_BYTES:] for file in files)
        assert hashlib.sha256(body).hexdigest() == self.truth["sha256"]
        assert not list(out.glob("range-*/*.partial"))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPTS / "fineweb-pipeline", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET, process_group=0,
    )  # fmt: skip


def here(arguments: list[str]) -> dict[str, Any]:
    """The command in this process, where it asks no cluster. Raises: FinewebError."""
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert said.exit_code == 0, said.output
    return json.loads(said.stdout)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err[-4000:]
    return json.loads(out) if out else {}, err


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """The first thing that is true, while the command runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := what():
            return found
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"it never came: {process.communicate()[1][-4000:]}")


def at_work(out: Path) -> int | None:
    """The process of a range that has tokens and is not whole."""
    for folder in shard_ranges.folders(out):
        if (folder / "writer.json").exists() and not (folder / shard_ranges.DONE_FILE).exists():
            state = json.loads((folder / "writer.json").read_text())
            said = (folder / cache.LOCK_FILE).read_text().split()
            running = said and psutil.pid_exists(int(said[0]))
            if state["tokens"] and not state["complete"] and running:
                return int(said[0])
    return None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    short = Path(f"/tmp/ray-{os.getpid()}")  # its sockets' paths must be short
    cluster = subprocess.Popen(
        [SCRIPTS / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={port}",
         "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats",
         f"--temp-dir={short}", f"--object-store-memory={80 << 20}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUIET, process_group=0,
    )  # fmt: skip
    how = Behaviour()
    try:
        with http_server(folder / "served", how) as url:
            made = World(folder, f"127.0.0.1:{port}", url, how)  # while the cluster starts
            assert cluster.stdout is not None
            for line in cluster.stdout:
                if "Ray runtime started" in line:
                    break
            else:
                raise AssertionError(f"no cluster: {cluster.wait()}")
            yield made
    finally:
        left = [*harness.descendants(cluster.pid), psutil.Process(cluster.pid)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, 10)
        cluster.wait()
        subprocess.run(["rm", "-rf", str(short)], check=True)


# ── the stream ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(300)  # three drivers, one after the other, on a machine that may be busy
def test_whatever_is_killed_the_stream_is_that_of_one_machine(world: World, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    command = world.arguments(out)
    world.how.bytes_per_s = world.slowly

    process = start(command)  # a Ray worker dies, then the driver is asked to stop
    pid = wait_for(lambda: at_work(out), process)
    assert "make_range" in psutil.Process(pid).cmdline()[0]
    children = harness.descendants(pid)
    os.kill(pid, signal.SIGKILL)
    done = wait_for(lambda: list(out.glob(f"range-*/{shard_ranges.DONE_FILE}")), process)
    assert children and not psutil.wait_procs(children, 5)[1]
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=75)
    assert "its Ray worker died, and another goes on" in err
    assert "the same command goes on" in err

    process = start(command)  # the driver dies
    wait_for(lambda: at_work(out), process)
    process.kill()
    process.communicate()

    before = {file: file.stat() for path in done for file in path.parent.glob("tokens_*.bin")}
    world.how.bytes_per_s = None
    result, _ = finish(start(command))
    world.holds(result, out)
    assert result["ranges"] == NUM_SHARDS // PER_RANGE > result["kept"] >= len(done) > 0
    assert before and all(
        (file.stat().st_ino, file.stat().st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
        for file, was in before.items()
    )
    logs = [log.read_text() for log in out.glob("range-*/log.txt")]
    assert any(" resuming " in log for log in logs)  # and did not begin again
    _says_what_it_holds(world, out)


def _says_what_it_holds(world: World, out: Path) -> None:
    said = json.loads((out / shard_ranges.STREAM_FILE).read_text())
    assert [shard for part in said["parts"] for shard in part["shards"]] == world.urls
    assert sum(part["tokens"] for part in said["parts"]) == world.truth["tokens"]

    again = here(world.arguments(out))  # nothing is left to do
    assert (again["kept"], again["sha256"]) == (NUM_SHARDS // PER_RANGE, world.truth["sha256"])

    fewer = [part for url in world.urls[1:] for part in ("--shards", url)]
    with pytest.raises(CursorMismatchError, match=r"shards: 6 shards, .* then, 5 shards"):
        here(world.arguments(out, *fewer))
    same = [part for url in world.urls for part in ("--shards", url)]
    with pytest.raises(CursorMismatchError, match=r"--range-gb: .* then, 9 now"):
        here(world.arguments(out, *same, "--range-gb", "9"))
    with pytest.raises(ConfigError, match="made in ranges"):
        here(["tokenize", "--shards", str(world.paths[0]), "--out", str(out)])

    lost = out / "range-00001" / "tokens_000000.bin"
    lost.unlink()
    with pytest.raises(ShardError, match=f"{lost} is missing"):
        here(world.arguments(out))


def test_a_bad_shard_is_named_with_its_range_and_host_on_a_cluster_of_ones_own(
    world: World, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl.zst"
    bad.write_bytes(world.paths[0].read_bytes()[:-500])
    shards = ["--shards", str(world.paths[1]), "--shards", str(bad)]
    out = tmp_path / "tokens"
    command = world.arguments(out, *shards, "--range-gb", "1e-9", address=on_ray.LOCAL)
    _, err = finish(start(command), code=3)
    assert f"range-00001 on {socket.gethostname()}: " in err
    assert "bad.jsonl.zst" in err


# ── refusals, before anything is begun ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong", [["--limit-tokens", "5"], ["--lanes", "2"], ["--shuffle"], ["--epochs", "2"]]
)
def test_what_concerns_the_whole_stream_at_once_does_not_go_with_ranges(
    tmp_path: Path, wrong: list[str]
) -> None:
    out = tmp_path / "tokens"
    with pytest.raises(ConfigError, match=f"{wrong[0]} does not go with --ray"):
        here(["tokenize", "--shards", "x", "--out", str(out), "--ray", "local", *wrong])
    assert not out.exists()


def test_nobody_listens_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"--ray {address}: .*refused"),
            on_ray._cluster(address),
        ):
            pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="needs the package ray"), on_ray._cluster("auto"):
        pass


# ── how it is cut, and a host's disk ────────────────────────────────────────────────────────


@given(sizes=st.lists(st.none() | st.integers(0, 50), max_size=40), most=st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_ranges_are_consecutive_and_no_longer_than_they_must_be(
    sizes: list[int | None], most: int
) -> None:
    shards = [Shard(n, f"file:///{n}", str(n), size, "") for n, size in enumerate(sizes)]
    cut = shard_ranges.cut(shards, most)
    assert [shard.name for one in cut for shard in one.shards] == [shard.name for shard in shards]
    assert [one.number for one in cut] == list(range(len(cut)))
    for one in cut:
        assert [shard.index for shard in one.shards] == list(range(len(one.shards)))
        before_last = [shard.size_bytes for shard in one.shards[:-1]]
        assert None not in before_last
        assert sum(size or 0 for size in before_last) < most


def test_a_host_has_no_more_cache_folders_than_tasks(tmp_path: Path) -> None:
    with range_task._slot(tmp_path, 2) as first, range_task._slot(tmp_path, 2) as second:
        assert first != second
        with pytest.raises(CacheInUseError), range_task._slot(tmp_path, 2):
            pass
    with range_task._slot(tmp_path, 2) as again:
        assert again == first
