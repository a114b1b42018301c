"""`tokenize --ray`: ranges of shards as tasks of a Ray cluster.

Runs in: the driver, which is the command line's own process.

What a Ray worker's death costs is what its run had not made durable (data.stream.writer_save_s);
the driver's death costs the same of every task at work, and the same command goes on.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from pipeline import (
    cache,
    catalog,
    durable,
    manifest,
    mixture,
    range_task,
    shard_ranges,
)
from pipeline.errors import (
    BadRecordsError,
    ConfigError,
    ExitCode,
    FinewebError,
    WorkerCrashError,
)
from pipeline.listing import Watch
from pipeline.range_task import Trouble
from pipeline.shard_ranges import Done, Range
from pipeline.sizes import usable_cpus
from pipeline.supervisor import Job
from pipeline.view import line_every_s

LOCAL = "local"
_TASK_CPUS = 4  # a task's default: one supervisor and one writer for so much work
_MAX_DEATHS = 3  # of a range's tasks without a token more in between
_TURN_S = 0.5
_SAY_S = 5.0  # between lines on a listing that takes long
_KNOCK_S = 5.0
_STOP_S = 60.0  # for all tasks to save where they are
_OBJECTS_BYTES = 100 << 20  # Ray's shared memory on this machine: no data goes through it


class Order(msgspec.Struct, frozen=True):
    """What is to be made."""

    job: Job  # run_dir is the folder of the whole stream
    address: str  # of a Ray cluster; local: one for this command
    range_bytes: int
    task_cpus: int | None = None  # None: _TASK_CPUS, or what the largest host has
    hash_whole: bool = True


class Progress(msgspec.Struct, frozen=True):
    """Where the stream stands. tokens: durable ones, of ranges at work too."""

    ranges: int
    done: int
    tokens: int
    elapsed_s: float
    done_bytes: int  # of shards
    all_bytes: int
    worked_bytes: int  # of shards, that this command has seen done


class Result(msgspec.Struct, frozen=True):
    """The stream. kept: ranges that were there already; cpu_s, wall_s: of the driver and of the
    attempts that finished ranges. sha256: None where it was not wanted."""

    tokens: int
    documents: int
    sha256: str | None
    shards: int
    ranges: int
    kept: int
    text_bytes: int
    bad_records: int
    filtered: int
    deaths: int
    hosts: tuple[str, ...]
    cpu_s: float
    wall_s: float
    files: str


Tell = Callable[[Progress], None]
Note = Callable[[str], None]


def look(order: Order, note: Note) -> tuple[tuple[catalog.Shard, ...], list[Range]]:
    """The shards and how they are cut; nothing is begun. Raises: ConfigError, SourceError."""
    stream = order.job.config.data.stream
    given = None if stream.manifest is None else manifest.read(Path(stream.manifest))
    kept = catalog.read_kept(Path(order.job.run_dir))
    watch = Watch(
        lambda done, total: note(f"looked at {done:,} of {total:,} shards"),
        lambda why, wait_s: note(f"{why}: tried again in {wait_s:.0f} s"),
        _SAY_S,
    )
    shards, _ = mixture.read(stream, stream.source_options(), catalog.Known(given, kept), watch)
    return shards, shard_ranges.cut(shards, order.range_bytes)


def run(order: Order, tell: Tell, note: Note) -> Result:
    """Make the ranges that are not there yet.

    Args:
        order: What to make.
        tell: Called now and then.
        note: Called with what a person wants to know.

    Raises:
        FinewebError: what went wrong, in which range and on which host, and what to do.
        KeyboardInterrupt: stopped; every task has saved where it is.
    """
    out = Path(order.job.run_dir)
    began = time.monotonic()
    with cache.own(out):
        if order.job.fresh:
            shard_ranges.start_over(out)
        shards, todo = look(order, note)
        catalog.keep(out, shards)
        shard_ranges.begin(order.job, shards, order.range_bytes)
        work = _Work(order, todo, tell, note)
        kept = len(work.done)
        if kept < len(todo):
            with _cluster(order.address) as ray:
                work.run(ray)
        while order.hash_whole and work.whole.take(work.done):
            work.report()
        result = work.result(kept, time.monotonic() - began)
        durable.write(out / shard_ranges.STREAM_FILE, msgspec.json.encode(_stream(result, work)))
        return result


def _stream(result: Result, work: _Work) -> dict[str, Any]:
    """What tokens.json holds."""
    parts = [
        {
            "range": one.name,
            **msgspec.to_builtins(work.done[one.number]),
            "shards": [shard.name for shard in one.shards],
        }
        for one in work.todo
    ]
    return {**msgspec.to_builtins(result), "parts": parts}


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected; a local cluster ends with the block, another one goes on.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a cluster that we start tells nobody
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "--ray needs the package ray", "pip install 'fineweb-pipeline[ray]', on every host"
        ) from None
    with ExitStack() as stack:
        own: dict[str, Any] = {}
        if address == LOCAL:
            folder = stack.enter_context(  # not below TMPDIR: its sockets' paths must be short
                tempfile.TemporaryDirectory("", "ray-", "/tmp", ignore_cleanup_errors=True)
            )
            own = {"num_cpus": usable_cpus(), "object_store_memory": _OBJECTS_BYTES,
                   "include_dashboard": False, "_node_ip_address": "127.0.0.1",
                   "_temp_dir": folder}  # fmt: skip
        try:
            _knock(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(
                f"--ray {address}: {str(error).splitlines()[0]}",
                "on a host of the cluster, give auto or HOST:PORT of its head (`ray status` shows "
                "whether there is one); local needs none",
            ) from None
        stack.callback(ray.shutdown)
        # Ray tells of its workers on standard output, which is for the result; we tell, too.
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(redirect_stdout(nowhere))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
        stack.callback(signal.signal, signal.SIGTERM, before)
        yield ray


def _knock(address: str) -> None:
    """See that somebody listens there: Ray itself would try for ten minutes. Raises: OSError."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


class _Work:
    """The ranges, and what has become of each."""

    def __init__(self, order: Order, todo: Sequence[Range], tell: Tell, note: Note) -> None:
        self._order, self.todo, self._tell, self._note = order, todo, tell, note
        self._out = Path(order.job.run_dir)
        found = {one.number: shard_ranges.read_done(order.job, one) for one in todo}
        self.done = {number: done for number, done in found.items() if done is not None}
        self._kept = frozenset(self.done)
        self.whole = shard_ranges.Whole(order.job, todo)
        self._began, self._told_s = time.monotonic(), 0.0
        self._waiting: dict[Any, Range] = {}
        self._deaths: dict[int, tuple[int, int]] = {}  # range → (in a row, tokens at the last)
        self.deaths = 0

    def run(self, ray: Any) -> None:
        """All that are missing as tasks, until they are there."""
        cpus = self._task_cpus(ray)
        task = ray.remote(num_cpus=cpus, max_retries=0, max_calls=1)(range_task.make_range)
        own = (
            cpus,
            self._order.job.config.data.stream.max_disk_gb,
            metadata.version(range_task.PACKAGE),
        )

        def submit(one: Range) -> None:
            # One argument by value: Ray would look into a bare list for its own references.
            job = shard_ranges.job_of(self._order.job, one)
            self._waiting[task.remote(msgspec.structs.replace(job, cpus=cpus), *own)] = one

        try:
            for one in self.todo:
                if one.number not in self.done:
                    submit(one)
            while self._waiting:
                ready, _ = ray.wait(list(self._waiting), timeout=_TURN_S)
                for future in ready:
                    one = self._waiting.pop(future)
                    if self._take(one, self._result(ray, future, one)):
                        submit(one)
                if self._order.hash_whole and not ready:
                    self.whole.take(self.done)
                self.report()
        except BaseException:  # also Ctrl-C
            self._stop(ray)
            raise

    def _task_cpus(self, ray: Any) -> int:
        """Of one task. Raises: ConfigError: no host has so many."""
        hosts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        most = max(hosts, default=0)
        wanted = self._order.task_cpus or max(1, min(_TASK_CPUS, most))
        if wanted > most and self._order.address == LOCAL:
            raise ConfigError(f"--task-cpus {wanted}: this machine has {most}", "give fewer")
        if wanted > most:
            self._note(f"no host of the cluster has {wanted} CPUs now: waiting for one")
        self._note(
            f"{len(self.todo) - len(self.done)} of {len(self.todo)} ranges to make, as tasks of "
            f"{wanted} CPUs on {len(hosts)} hosts with {sum(hosts)} CPUs"
        )
        return wanted

    def _result(self, ray: Any, future: Any, one: Range) -> Done | Trouble | None:
        """What a task has said; None: its worker died, and it may be tried again."""
        try:
            said: Done | Trouble = ray.get(future)
            return said
        except ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except ray.exceptions.RayError as error:
            self.deaths += 1
            tokens = shard_ranges.tokens_so_far(self._out, one)
            times, before = self._deaths.get(one.number, (0, -1))
            times = 1 if tokens > before else times + 1
            self._deaths[one.number] = times, tokens
            how = str(error).strip().splitlines()[0]
            if times > _MAX_DEATHS:
                raise WorkerCrashError(
                    f"{one.name} ({one.shards[0].name} …): its Ray worker died {times} times "
                    f"without a token more, the last time so: {how}",
                    f"see {self._out / one.name}/log.txt; with more --task-cpus fewer tasks share "
                    "a host's memory; the same command goes on from here",
                ) from None
            self._note(f"{one.name}: its Ray worker died, and another goes on ({how})")
            return None

    def _take(self, one: Range, said: Done | Trouble | None) -> bool:
        """Whether a range has to be tried again. Raises: FinewebError."""
        if isinstance(said, Trouble):
            error = FinewebError(f"{one.name} on {said.host}: {said.what}", said.remedy)
            error.exit_code = ExitCode(said.exit_code)
            raise error
        if said is None:
            return True
        self.done[one.number] = said
        count = sum(done.bad_records for done in self.done.values())
        most = self._order.job.config.data.stream.max_bad_records
        if count > most:
            raise BadRecordsError(
                f"{count} bad records in all, the last of them in {one.name}",
                f"{self._out}/range-*/bad_records.jsonl name them; --max-bad-records allows more "
                f"than {most}",
            )
        return False

    def _stop(self, ray: Any) -> None:
        """Let every task save where it is; those that have not begun never do."""
        for future in self._waiting:
            ray.cancel(future)
        if self._waiting:
            ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=_STOP_S)

    # ── what is known ───────────────────────────────────────────────────────────────────────

    def report(self) -> None:
        """Tell where the stream stands, if it is time for it."""
        elapsed_s = time.monotonic() - self._began
        if elapsed_s - self._told_s < line_every_s(elapsed_s):
            return
        self._told_s = elapsed_s
        at_work = [one for one in self._waiting.values() if one.number not in self.done]
        self._tell(
            Progress(
                ranges=len(self.todo),
                done=len(self.done),
                tokens=sum(done.tokens for done in self.done.values())
                + sum(shard_ranges.tokens_so_far(self._out, one) for one in at_work),
                elapsed_s=elapsed_s,
                done_bytes=sum(self.todo[number].size_bytes for number in self.done),
                all_bytes=sum(one.size_bytes for one in self.todo),
                worked_bytes=sum(
                    self.todo[number].size_bytes for number in self.done.keys() - self._kept
                ),
            )
        )

    def result(self, kept: int, wall_s: float) -> Result:
        """Of all ranges."""
        parts = list(self.done.values())
        mine = time.process_time()
        return Result(
            tokens=sum(part.tokens for part in parts),
            documents=sum(part.documents for part in parts),
            sha256=self.whole.hexdigest() if self._order.hash_whole else None,
            shards=sum(part.shards for part in parts),
            ranges=len(self.todo),
            kept=kept,
            text_bytes=sum(part.text_bytes for part in parts),
            bad_records=sum(part.bad_records for part in parts),
            filtered=sum(part.filtered for part in parts),
            deaths=self.deaths,
            hosts=tuple(sorted({part.host for part in parts})),
            cpu_s=round(mine + sum(part.cpu_s for part in parts), 3),
            wall_s=round(wall_s, 3),
            files=f"{self._out}/range-*/tokens_*.bin",
        )
