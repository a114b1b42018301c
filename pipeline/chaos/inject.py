"""What goes wrong in a campaign, when, and how often: everything from one seed.

Runs in: chaos. Signals come from outside at random times; what only a process can do to itself
(meet a full disk, take all memory, hang in the middle of something) is planted at a named point
when a run starts, through FINEWEB_FAULT.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import psutil

from pipeline import cache
from pipeline.chaos.observe import children
from pipeline.chaos.server import FAULTS, FaultyServer

# How often each kind happens, relative to the others.
_WEIGHTS = {
    "kill tokenizer": 5.0,
    "kill decompressor": 4.0,
    "kill fetcher": 3.0,
    "kill consumer": 0.4,
    "kill supervisor": 0.25,
    "stop and continue": 3.0,
    "stop for good": 0.2,
    "server fault": 2.0,
    "damage in the cache": 0.6,
    "clean stop": 0.15,
}
# Planted at a run's start: action, role, point, and how late at most it happens.
_PLANTED = (
    ("full", "fetcher", "fetcher:mid_write", 200),
    ("full", "supervisor", "log:before_write", 400),
    ("hang", "tokenizer", "tokenizer:mid_place", 60),
    ("hang", "decompressor", "decompressor:mid_block", 60),
    ("memory", "tokenizer", "tokenizer:before_encode", 60),
    ("kill", "tokenizer", "tokenizer:mid_place", 60),
    ("kill", "any", "fetcher:before_rename", 40),
)
_PLANTED_BY_KIND = {
    "train": (
        ("full", "trainer", "checkpoint:mid_write", 6),
        ("kill", "trainer", "checkpoint:mid_write", 4),
        ("kill", "trainer", "checkpoint:before_rename", 4),
    ),
    "tokenize": (
        ("full", "writer", "writer:mid_write", 100),
        ("kill", "writer", "writer:before_rename", 6),
    ),
}
_STOP_S = (0.2, 3.0)  # shorter than the campaign's hang_s
_MEAN_GAP_S = {"tokenize": 0.4, "train": 0.7}  # a trainer takes seconds to start
_CONSUMERS = ("trainer", "writer")


class Injector:
    """Draws faults, carries them out and counts them.

    Args:
        seed: Of the campaign.
        kind: tokenize or train.
        server: The remote side.
        cache_dir: Of the run.
        notes_dir: Where planted faults leave their marks.
    """

    def __init__(
        self, seed: int, kind: str, server: FaultyServer, cache_dir: Path, notes_dir: Path
    ) -> None:
        self._random = random.Random(seed)
        self._kind, self._server = kind, server
        self._cache_dir, self._notes_dir = cache_dir, notes_dir
        self.counts: Counter[str] = Counter()
        self.kills = 0  # processes that got SIGKILL from here, or a stop that only ends so
        self._stopped: list[tuple[float, psutil.Process]] = []
        self._latches: dict[Path, str] = {}
        self._next_at = 0.0

    # ── planted at a start ──────────────────────────────────────────────────────────────────

    def plant(self) -> str:
        """FINEWEB_FAULT for a run that starts now: two faults, each at a random moment."""
        choices = [*_PLANTED, *_PLANTED_BY_KIND[self._kind]]
        specs = []
        for action, role, point, most in self._random.sample(choices, 2):
            latch = self._notes_dir / f"planted-{len(self._latches)}"
            self._latches[latch] = f"{action} at {point}"
            specs.append(f"{action}:{role}:{point}:{self._random.randint(1, most)}:{latch}")
        return ";".join(specs)

    def planted(self) -> Counter[str]:
        """Planted faults that have happened."""
        return Counter(what for latch, what in self._latches.items() if latch.exists())

    # ── from outside ────────────────────────────────────────────────────────────────────────

    def due(self, now: float) -> bool:
        """Whether the next fault is due."""
        return now >= self._next_at

    def step(self, supervisor: psutil.Process) -> bool:
        """Do what is due now. Returns whether the supervisor was killed."""
        now = time.monotonic()
        self._continue_due(now)
        if not self.due(now):
            return False
        self._next_at = now + self._random.expovariate(1 / _MEAN_GAP_S[self._kind])
        kinds, weights = zip(*_WEIGHTS.items(), strict=True)
        kind = self._random.choices(kinds, weights)[0]
        try:
            return self._inject(kind, supervisor, now)
        except (psutil.NoSuchProcess, FileNotFoundError):  # it has just ended by itself
            return False

    def _inject(self, kind: str, supervisor: psutil.Process, now: float) -> bool:
        match kind.split():
            case ["kill", "supervisor"]:
                self._note(kind, kills=1)
                supervisor.kill()
                return True
            case ["kill", role]:
                if victim := self._worker(supervisor, role):
                    victim.kill()
                    self._note(kind, kills=1)
            case ["stop", "and", _]:
                self._stop(supervisor, self._random.uniform(*_STOP_S), now)
            case ["stop", *_]:
                if victim := self._worker(supervisor, "worker"):
                    victim.suspend()  # the deadline on progress has to find it
                    self._note(kind)
            case ["server", _]:
                fault = self._random.choice(FAULTS)
                self._server.fail_next(fault, self._random.randint(1, 3))
                self._note(f"server {fault}")
            case ["damage", *_]:
                self._damage()
            case _:
                if children(supervisor):  # else it does not heed signals yet
                    supervisor.terminate()
                    self._note(kind)
        return False

    def _note(self, kind: str, kills: int = 0) -> None:
        self.counts[kind] += 1
        self.kills += kills

    def _worker(self, supervisor: psutil.Process, role: str) -> psutil.Process | None:
        """A random process of a role; consumer, worker (any but the consumer) and any go, too."""
        found = []
        for process in children(supervisor):
            name = role_of(process)
            kinds = {name, "any", "consumer" if name in _CONSUMERS else "worker"}
            if name and role in kinds and process.status() != psutil.STATUS_STOPPED:
                found.append(process)
        return self._random.choice(found) if found else None

    def _stop(self, supervisor: psutil.Process, seconds: float, now: float) -> None:
        one_in_six = self._random.random() < 1 / 6
        victim = supervisor if one_in_six else self._worker(supervisor, "any")
        if victim is None:
            return
        role = "supervisor" if one_in_six else role_of(victim)
        victim.suspend()
        self._stopped.append((now + seconds, victim))
        self._note(f"stop and continue {role}")

    def _continue_due(self, now: float) -> None:
        due = [one for one in self._stopped if one[0] <= now]
        self._stopped = [one for one in self._stopped if one[0] > now]
        for _, process in due:
            _resume(process)

    def continue_all(self) -> None:
        """Let everything that is stopped go on: the faults are over, or the run is."""
        for _, process in self._stopped:
            _resume(process)
        self._stopped.clear()

    def _damage(self) -> None:
        """Cut, alter or delete a whole shard in the cache."""
        paths = [p for p in self._cache_dir.glob("*.shard") if cache.parse(p.name) is not None]
        if not paths:
            return
        path = self._random.choice(paths)
        how = self._random.choice(("cut", "altered", "deleted"))
        if how == "deleted":
            path.unlink()
        else:
            with path.open("r+b") as file:
                size = path.stat().st_size
                at = self._random.randrange(size)
                if how == "cut":
                    file.truncate(at)
                else:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 0xFF]))
        self._note(f"cached shard {how}")


def role_of(process: psutil.Process) -> str:
    """fetcher, decompressor … or '' for a process that is no worker."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    if "pipeline.child" not in words:
        return ""
    return words[words.index("pipeline.child") + 1]


def _resume(process: psutil.Process) -> None:
    try:
        process.resume()
    except psutil.Error:  # it was killed meanwhile
        return
