"""Runs that together pass every point of the protocol: for the kill matrix.

Each is a real run with a real server. What makes a rare message come about (a full disk, a bug, a
damaged file, a request to stop) belongs to the scenario and happens with or without the kill.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.supervisor import Job
from tests.harness import descendants, english, job, write_shards
from tests.servers import Behaviour, http_server
from tests.training_jobs import final_weights, steps_of, training

_WAIT_S = 300.0  # a test has its own limit; a campaign may share the machine
_OUTGROWN_BYTES = 17 << 20  # more than one grant (Plan.grant_step_bytes)


@dataclass
class World:
    """Shards, and the servers that they come from."""

    plain: list[str]
    slow: list[str]  # a few seconds for all of it, and one shard's answers are cut off
    endless: list[str]  # one shard of unknown length, longer than its first grant
    broken: list[str]  # one shard is cut off
    single: list[str]
    few: list[str]  # less than a training run wants


@contextmanager
def world(base: Path) -> Iterator[World]:
    """Make the shards and serve them."""
    documents = english(160)
    folder = base / "shards"
    names = [path.name for path in write_shards(folder, documents, 6, "jsonl.zst")]
    write_shards(folder / "single", documents[:60], 1, "jsonl.zst")
    noise = random.Random(0)
    junk = [base64.b64encode(noise.randbytes(_OUTGROWN_BYTES // 160)).decode() for _ in range(160)]
    lines = [
        json.dumps({"text": t[:2000], "junk": j}) for t, j in zip(documents, junk, strict=True)
    ]
    (folder / "outgrown.jsonl").write_text("\n".join(lines) + "\n")
    few = [path.name for path in write_shards(folder / "few", documents[:6], 2, "jsonl.zst")]
    whole = (folder / names[2]).read_bytes()
    (folder / "cut.jsonl.zst").write_bytes(whole[: len(whole) * 2 // 3])
    with ExitStack() as stack:
        fast = stack.enter_context(http_server(folder))
        cutting = Behaviour(bytes_per_s=300_000, cut_after={names[1]: 30_000})
        slow = stack.enter_context(http_server(folder, cutting))
        chunked = stack.enter_context(http_server(folder, Behaviour(no_length={"outgrown.jsonl"})))
        single = stack.enter_context(http_server(folder / "single"))
        short = stack.enter_context(http_server(folder / "few"))
        yield World(
            plain=[f"{fast}/{name}" for name in names],
            slow=[f"{slow}/{name}" for name in names],
            endless=[f"{chunked}/{names[0]}", f"{chunked}/outgrown.jsonl"],
            broken=[f"{fast}/{name}" for name in (names[0], "cut.jsonl.zst", names[1])],
            single=[f"{single}/shard-00000.jsonl.zst"],
            few=[f"{short}/{name}" for name in few],
        )


def _nothing(process: subprocess.Popen[str], folder: Path) -> None:
    """Let the run go."""


def _no_faults(folder: Path) -> str:
    return ""


def _stream(folder: Path, summary: dict[str, Any]) -> Any:
    return summary["sha256"], summary["tokens"], summary["documents"]


def _training(folder: Path, summary: dict[str, Any]) -> Any:
    return steps_of(folder), final_weights(folder)


@dataclass(frozen=True)
class Scenario:
    """One kind of run.

    result: what must be the same with and without kills. codes: exit codes, beside a clean stop,
    after which the same command goes on. own_deaths: deaths that belong to the scenario.
    """

    name: str
    job: Callable[[Path, World], Job]
    result: Callable[[Path, dict[str, Any]], Any] = _stream
    faults: Callable[[Path], str] = _no_faults
    conduct: Callable[[subprocess.Popen[str], Path], None] = _nothing
    codes: tuple[int, ...] = ()
    own_deaths: int = 0

    @property
    def once(self) -> bool:
        """Whether what makes this run special happens once, so that it takes one kill."""
        return self.faults is not _no_faults


def _tokenize(shards: Callable[[World], list[str]], **changes: Any) -> Callable[..., Job]:
    settings: dict[str, Any] = {
        "lanes": 2, "decompressors": 2, "fetchers": 2, "file_tokens": 20_000,
        "writer_save_s": 0.05, "tokenizer": {"vocab_size": 600}, **changes,
    }  # fmt: skip
    return lambda folder, here: job(folder, shards(here), **settings)


def _train(folder: Path, here: World) -> Job:
    return training(folder, here.plain)


def _train_to_the_end(folder: Path, here: World) -> Job:
    return training(folder, here.few, lanes=2, epochs=1)


# ── what the scenarios need done ────────────────────────────────────────────────────────────


def _until(process: subprocess.Popen[str], condition: Callable[[], Any]) -> bool:
    """Wait for something; False if the run has ended before."""
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
    return True


def _interrupt(process: subprocess.Popen[str], folder: Path) -> None:
    """A clean stop while the consumer is at work, and held, so that it is not done before."""
    held, log = folder / "held", folder / "run" / "log.txt"
    if _until(process, held.exists):
        process.terminate()  # SIGINT may be switched off: a job in the background
        _until(process, lambda: "stopping" in log.read_text())
        _continue(held)


def _continue(mark: Path) -> None:
    pid = int(mark.read_text().split()[1])
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


def _damage_while_open(process: subprocess.Popen[str], folder: Path) -> None:
    """Alter the one shard in the cache while two turns of it are open and stand still, because
    the writer does; whoever opens it again has to notice, and the other turn has to be closed."""
    held = folder / "held"
    if not _until(process, held.exists) or not _until(process, lambda: _idle(process)):
        return
    for path in (folder / "cache").glob("*.shard"):
        data = bytearray(path.read_bytes())
        data[-20] ^= 0xFF
        path.write_bytes(data)
    before = _decompressors(process)
    for one in before:
        one.kill()
    _until(process, lambda: len(_decompressors(process) - before) == len(before))
    _until(process, lambda: _idle(process))
    _continue(held)


def _decompressors(process: subprocess.Popen[str]) -> set[psutil.Process]:
    found = set()
    for child in descendants(process.pid):
        with contextlib.suppress(psutil.Error):
            if "decompressor" in child.cmdline():
                found.add(child)
    return found


def _idle(process: subprocess.Popen[str]) -> bool:
    """Whether the decompressors have done nothing for a while."""

    def worked() -> dict[int, float]:
        times = {}
        for one in _decompressors(process):
            with contextlib.suppress(psutil.Error):
                times[one.pid] = sum(one.cpu_times()[:2])
        return times

    before = worked()
    time.sleep(0.7)
    return before == worked()


def _raise(role: str, point: str) -> Callable[[Path], str]:
    return lambda folder: f"raise:{role}:{point}:1:{folder / 'raised'}"


def _hold(role: str, point: str, count: int) -> Callable[[Path], str]:
    return lambda folder: f"stop:{role}:{point}:{count}:{folder / 'held'}"


_PLAIN = _tokenize(lambda here: here.plain)
_ALL = [
    Scenario("plain", _PLAIN),
    Scenario("slow", _tokenize(lambda here: here.slow)),
    Scenario("train", _train, _training),
    Scenario("train out", _train_to_the_end, _training),
    Scenario("outgrown", _tokenize(lambda here: here.endless)),
    Scenario("cut shard", _tokenize(lambda here: here.broken, max_bad_shards=1)),
    Scenario(
        "full disk",
        _PLAIN,
        faults=lambda folder: f"full:fetcher:fetcher:mid_write:2:{folder / 'full'}",
    ),
    Scenario(
        "full train",
        _train,
        _training,
        faults=lambda folder: f"full:trainer:checkpoint:mid_write:2:{folder / 'full'}",
    ),
    Scenario("stop", _PLAIN, faults=_hold("writer", "writer:after_write", 3), conduct=_interrupt),
    Scenario(
        "stop train",
        _train,
        _training,
        faults=_hold("trainer", "trainer:step", 5),
        conduct=_interrupt,
    ),
    Scenario(
        "damage",
        _tokenize(
            lambda here: here.single, lanes=1, workers=1, epochs=3, prefetch=0, block_bytes=20_000
        ),
        faults=_hold("writer", "writer:after_write", 1),
        conduct=_damage_while_open,
        own_deaths=4,
    ),
    *(
        Scenario(
            f"bug in {role}",
            _train if role == "trainer" else _PLAIN,
            _training if role == "trainer" else _stream,
            faults=_raise(role, point),
            codes=(1,),
        )
        for role, point in (
            ("fetcher", "received:Fetch"),
            ("decompressor", "decompressor:mid_block"),
            ("tokenizer", "tokenizer:before_encode"),
            ("writer", "writer:after_write"),
            ("trainer", "trainer:step"),
        )
    ),
]  # fmt: skip
SCENARIOS = {scenario.name: scenario for scenario in _ALL}
