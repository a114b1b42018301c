"""Starts all ranks of a run, passes requests to stop on, and starts them again when one is lost.

Runs in: the command line's own process.

What mlx.launch leaves open is closed here: a rank that fails is the job's failure, the launcher's
death ends the ranks (pipeline/rank_process.py), and a lost rank or host ends all of them within
ranks.timeout_s, after which the job goes on from its last checkpoint if --max-restarts says so.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline import sizes, spawn
from pipeline.errors import ConfigError, ExitCode, FinewebError, PeerLostError
from pipeline.rank_process import Ending, Order
from pipeline.ranks import Rank
from pipeline.supervisor import Job, Outcome, Stops, stop_signals

_GRACE_S = 10.0  # beyond ranks.timeout_s, for ranks to end by themselves
_LINES = 40  # of a rank's standard error that are shown if it fails
_LOCAL = ("127.0.0.1", "localhost", "::1")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


class Place(msgspec.Struct, frozen=True):
    """Where a rank runs: an entry of MLX's hostfile."""

    ssh: str
    ips: list[str] = []

    @property
    def local(self) -> bool:
        """Whether that is this machine."""
        return self.ssh in (*_LOCAL, socket.gethostname())

    @property
    def ip(self) -> str:
        """Where the other ranks reach it."""
        if self.ips:
            return self.ips[0]
        if self.local:
            return "127.0.0.1"
        raise ConfigError(
            f"the hostfile gives no ips for {self.ssh}", 'add "ips": ["ADDRESS"] to its entry'
        )


class _Hostfile(msgspec.Struct, frozen=True):
    hosts: list[Place]
    backend: str = ""
    envs: list[str] = []


class Layout(NamedTuple):
    """Ranks, how they reach one another, and how often they may be started again."""

    places: tuple[Place, ...]
    backend: str  # ring or nccl
    environment: dict[str, str]
    port: int  # the first of 1 + ranks, with a hostfile; on one machine free ones are taken
    max_restarts: int


def layout(
    ranks: int | None, hostfile: str | None, backend: str, port: int, max_restarts: int
) -> Layout | None:
    """What the options ask for; None: one rank, here.

    Raises:
        ConfigError: the hostfile cannot be used, or names a library that only mlx.launch starts.
    """
    if hostfile is None:
        hosts = _Hostfile([Place(_LOCAL[0])] * (ranks or 1))
    else:
        hosts = _read(Path(hostfile))
        if ranks is not None:
            hosts = msgspec.structs.replace(
                hosts, hosts=[place for place in hosts.hosts for _ in range(ranks)]
            )
    if len(hosts.hosts) == 1 and hosts.hosts[0].local and not max_restarts:
        return None
    chosen = backend if backend != "auto" else hosts.backend or _backend()
    if chosen not in ("ring", "nccl"):
        raise ConfigError(
            f"{chosen} is started by MLX's own launcher",
            f"mlx.launch --hostfile {hostfile} --backend {chosen} -- fineweb-pipeline start …",
        )
    envs = dict(one.partition("=")[::2] for one in hosts.envs)
    return Layout(tuple(hosts.hosts), chosen, envs, port, max_restarts)


def _read(path: Path) -> _Hostfile:
    try:
        data = path.read_bytes()
        if data.lstrip().startswith(b"["):
            found = _Hostfile(msgspec.json.decode(data, type=list[Place]))
        else:
            found = msgspec.json.decode(data, type=_Hostfile)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{path} is no hostfile: {error}",
            'as for mlx.launch: [{"ssh": "mac-1", "ips": ["10.0.0.1"]}, …]',
        ) from error
    if not found.hosts:
        raise ConfigError(f"{path} names no host", "give at least one")
    return found


def _backend() -> str:
    """NCCL where MLX was built for CUDA."""
    for name in ("mlx-cuda-13", "mlx-cuda-12"):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            return "nccl"
    return "ring"


def for_rank(job: Job, rank: Rank) -> Job:
    """The job as one rank does it: rank 0 in the run's folder, the others in folders below it."""
    if rank.number == 0:
        return msgspec.structs.replace(job, rank=rank)
    below = f"ranks/{rank.number}"
    run_dir = f"{job.run_dir}/{below}"
    given = job.config.data.stream.cache_dir
    cache_dir = f"{run_dir}/cache" if given is None else f"{given}/{below}"
    return msgspec.structs.replace(job, rank=rank, run_dir=run_dir, cache_dir=cache_dir)


# ── the job, with its restarts ──────────────────────────────────────────────────────────────


def run(
    job: Job, wanted: Layout, progress: str, tell: Callable[..., None] = lambda *args, **more: None
) -> Outcome:
    """Run all ranks to their end.

    Args:
        job: The run.
        wanted: Its ranks.
        progress: What rank 0 shows; the others show nothing.
        tell: Called with (level, event, fields) when the ranks are started again.

    Returns:
        Rank 0's outcome.

    Raises:
        FinewebError: of the first rank that failed; names it.
    """
    restarts = 0
    with stop_signals() as stops:
        while True:
            attempt = _Attempt(job, wanted, progress, stops)
            endings = attempt.run()
            error = _error(wanted.places, endings, attempt.words)
            first = endings[0]
            if error is None and first.outcome is not None:
                return first.outcome
            assert error is not None
            again = error.exit_code is ExitCode.RESUME and not stops.count
            if not again or restarts >= wanted.max_restarts:
                raise error
            restarts += 1
            wanted = _still_there(wanted, job)
            job = msgspec.structs.replace(job, fresh=False)
            tell("warning", "ranks_started_again", why=error.what, ranks=len(wanted.places),
                 restart=restarts, of=wanted.max_restarts)  # fmt: skip


def _error(
    places: Sequence[Place], endings: Sequence[Ending], words: Sequence[str]
) -> FinewebError | None:
    """What the user is told: the error that trying again does not cure, or who was lost first."""
    if endings[0].outcome is not None and all(one.outcome is not None for one in endings):
        return None
    failed = [n for n, one in enumerate(endings) if one.outcome is None]
    lasting = [n for n in failed if 0 < endings[n].code <= ExitCode.SOURCE]
    lost = [n for n in failed if not endings[n].what]  # it could not even say why
    number = (lasting or lost or failed)[0]
    ending = endings[number]
    who = f"rank {number} ({places[number].ssh})"
    said = f": {words[number]}" if not ending.what and words[number] else ""
    how = ending.what or f"ended with {_how(ending.code)}{said}"
    kind = FinewebError if lasting else PeerLostError
    remedy = ending.remedy or "the same command goes on from the last checkpoint"
    error = kind(f"{who}: {how}", remedy)
    error.exit_code = ExitCode(ending.code) if lasting else ExitCode.RESUME
    return error


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _still_there(wanted: Layout, job: Job) -> Layout:
    """The ranks whose hosts answer: as many of them as can share the lanes.

    Raises:
        PeerLostError: rank 0's host is gone, and the checkpoints with it.
    """
    hosts = sorted({place.ssh for place in wanted.places if not place.local})

    def answers(host: str) -> bool:
        code = subprocess.call([*_SSH, host, "true"], stdin=subprocess.DEVNULL)
        return code == 0

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        gone = {host for host, there in zip(hosts, pool.map(answers, hosts), strict=True)
                if not there}  # fmt: skip
    if wanted.places[0].ssh in gone:
        raise PeerLostError(
            f"rank 0's host {wanted.places[0].ssh} does not answer; the checkpoints are there",
            "start again when it is back, or on a host that has a copy of the run's folder",
        )
    left = [place for place in wanted.places if place.ssh not in gone]
    lanes = job.config.data.stream.lanes
    most = max(n for n in range(1, len(left) + 1) if lanes % n == 0)
    return wanted._replace(places=tuple(left[:most]))


# ── one attempt ─────────────────────────────────────────────────────────────────────────────


class _Attempt:
    """All ranks, from their start to the end of the last one."""

    def __init__(self, job: Job, wanted: Layout, progress: str, stops: Stops) -> None:
        self._job, self._wanted, self._progress, self._stops = job, wanted, progress, stops
        self._processes: list[subprocess.Popen[bytes]] = []
        size = len(wanted.places)
        self._out = [bytearray() for _ in range(size)]
        self._err: list[deque[str]] = [deque(maxlen=_LINES) for _ in range(size)]
        self._selector = selectors.DefaultSelector()
        self._passed_on = 0

    @property
    def words(self) -> list[str]:
        """The last line of every rank's standard error."""
        return [lines[-1] if lines else "" for lines in self._err]

    def run(self) -> list[Ending]:
        """Every rank's ending, in their order."""
        with ExitStack() as stack:
            stack.callback(self._end)
            self._selector.register(self._stops.readable, selectors.EVENT_READ)
            for number, order in enumerate(self._orders()):
                self._start(number, order)
            self._wait()
        return [self._ending(number) for number in range(len(self._processes))]

    def _orders(self) -> list[Order]:
        places = self._wanted.places
        size = len(places)
        if all(place.local for place in places):
            meeting, *ports = free_ports(1 + size)
        else:
            meeting, *ports = range(self._wanted.port, self._wanted.port + 1 + size)
        ring = [[f"{place.ip}:{port}"] for place, port in zip(places, ports, strict=True)]
        key, orders = secrets.token_hex(16), []
        for number in range(size):
            rank = Rank(number, size, f"{places[0].ip}:{meeting}", key)
            orders.append(
                Order(
                    job=for_rank(self._job, rank if size > 1 else Rank()),
                    progress="none" if number else self._progress,
                    environment=self._environment(number, f"{places[0].ip}", ports[0]),
                    ring=ring if self._wanted.backend == "ring" and size > 1 else None,
                )
            )
        return orders

    def _environment(self, number: int, ip: str, port: int) -> dict[str, str]:
        """What MLX reads, and threads for one rank's part of its host."""
        places = self._wanted.places
        here = [n for n, place in enumerate(places) if place.ssh == places[number].ssh]
        found = dict(self._wanted.environment)
        if len(here) > 1 and places[number].local and "OMP_NUM_THREADS" not in os.environ:
            threads = str(max(1, sizes.usable_cpus() // len(here)))
            found |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if len(places) > 1:
            found["MLX_RANK"] = str(number)
        if self._wanted.backend == "nccl" and len(places) > 1:
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = here.index(number)
            device = devices[index] if len(devices) >= len(here) > 1 else str(index)
            found |= {"MLX_WORLD_SIZE": str(len(places)), "NCCL_HOST_IP": ip,
                      "NCCL_PORT": str(port), "CUDA_VISIBLE_DEVICES": device}  # fmt: skip
        return found

    def _start(self, number: int, order: Order) -> None:
        place = self._wanted.places[number]
        command = [sys.executable, "-m", "pipeline.rank_process"]
        if not place.local:
            there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
            command = [*_SSH, place.ssh, there]
        process = spawn.start_rank(command, quiet=number > 0)
        self._processes.append(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self._selector.register(stream, selectors.EVENT_READ, number)
        self._say(process, msgspec.json.encode(order) + b"\n")

    @staticmethod
    def _say(process: subprocess.Popen[bytes], line: bytes) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its code says how
            process.stdin.write(line)
            process.stdin.flush()

    def _wait(self) -> None:
        """Until all have ended; the others of one that was lost get a bounded time."""
        deadline = float("inf")
        while any(process.poll() is None for process in self._processes):
            for key, _ in self._selector.select(0.2):
                if key.data is None:
                    with suppress(BlockingIOError):
                        self._stops.readable.recv(64)
                else:
                    self._read(key.fileobj, key.data)
            for _ in range(self._stops.count - self._passed_on):
                self._passed_on += 1
                for process in self._processes:
                    self._say(process, b"stop\n")
            ended = [n for n, p in enumerate(self._processes) if p.poll() is not None]
            if any(self._ending(number).outcome is None for number in ended):
                grace = self._job.config.ranks.timeout_s + _GRACE_S
                deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                return
        for number, process in enumerate(self._processes):
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    self._read(stream, number)

    def _read(self, stream: Any, number: int) -> None:
        process = self._processes[number]
        data = stream.read()
        if data == b"":
            with suppress(KeyError):
                self._selector.unregister(stream)
        elif data is not None and stream is process.stdout:
            self._out[number] += data
        elif data is not None:
            lines = data.decode(errors="replace").splitlines()
            self._err[number].extend(line for line in lines if line.strip())

    def _ending(self, number: int) -> Ending:
        """What the rank said at its end, or its bare exit code."""
        if self._processes[number].poll() is not None:
            self._read(self._processes[number].stdout, number)
        try:
            return msgspec.json.decode(bytes(self._out[number]), type=Ending)
        except msgspec.MsgspecError:
            code = self._processes[number].poll()
            return Ending(-9 if code is None else code)

    def _end(self) -> None:
        """Nothing of it is left: who still runs is killed, and its workers end with it."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stderr):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
        self._selector.close()


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody has now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]
