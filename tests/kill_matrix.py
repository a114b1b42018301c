"""`kill -9` at every point of the protocol: the stream is the same and nothing is left behind.

    python -m tests.kill_matrix                  every point once: about 250 kills
    python -m tests.kill_matrix --rounds 5       at its 1st, 2nd, 3rd, 5th and 8th passing
    python -m tests.kill_matrix --only writer    one role, or one message: send:Log

The points come from the sources (tests/points.py). Each scenario is a real run that passes some
of them; an undisturbed run with `record` finds out which, so that no kill is wasted and no point
can be forgotten. A line is printed for every kill; the exit code is 0 if all of them held.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline import cache
from tests.harness import descendants, events, finish, start
from tests.points import SUPERVISOR, Point, matrix
from tests.scenarios import SCENARIOS, Scenario, World, world

PASSINGS = (1, 2, 3, 5, 8, 13)  # which passing of a point the kill comes at, by round
_LAST = ("after_send:ConsumerDone", "after_send:Failed")
_PER_BATCH = {"fetcher": 2, "decompressor": 2, "tokenizer": 2, "writer": 2, "trainer": 2}
_STARTS = 4  # of one job, the killed one included


@dataclass(frozen=True)
class Kill:
    """One cell of the matrix in one scenario."""

    point: Point
    count: int = 1

    def plan(self, latch: Path) -> str:
        return f"kill:{self.point.role}:{self.point.name}:{self.count}:{latch}"


@dataclass
class Outcome:
    """What a run with kills led to."""

    result: Any
    fired: int
    deaths: int  # that supervisors saw, and supervisors that died


class Matrix:
    """Scenarios, their undisturbed results, and the points that each of them passes.

    Args:
        base: Folder for everything.
        here: Shards and servers.
    """

    def __init__(self, base: Path, here: World) -> None:
        self.base, self.here = base, here
        self._expected: dict[str, Any] = {}
        self._passed: dict[str, frozenset[Point]] = {}
        self._runs = 0

    def learn(self, scenario: Scenario) -> frozenset[Point]:
        """Run a scenario undisturbed, once: its result, and the points that it passes."""
        if scenario.name not in self._passed:
            folder = self._folder()
            seen = folder / "seen"
            outcome = self._run(scenario, folder, f"record:any:*:0:{seen}", ())
            self._expected[scenario.name] = outcome.result
            marks = (path.name[len("seen.") :] for path in folder.glob("seen.*"))
            points = (Point(*mark.split(".", 1)) for mark in marks)
            self._passed[scenario.name] = frozenset(points)
        return self._passed[scenario.name]

    def cover(self) -> dict[Point, Scenario]:
        """The first scenario that passes each point; points that none passes are missing."""
        found: dict[Point, Scenario] = {}
        for scenario in SCENARIOS.values():
            passed = self.learn(scenario)
            print(f"{scenario.name}: passes {len(passed)} points", flush=True)
            for point in passed:
                found.setdefault(point, scenario)
        return {point: found[point] for point in matrix() if point in found}

    def check(self, scenario: Scenario, kills: list[Kill]) -> int:
        """Run a scenario with these kills and hold it against the undisturbed run.

        Returns:
            How many of the kills came about: a point may be passed less often than count says.
        """
        self.learn(scenario)
        folder = self._folder()
        latches = [folder / f"fired-{number}" for number in range(len(kills))]
        plans = ";".join(kill.plan(latch) for kill, latch in zip(kills, latches, strict=True))
        outcome = self._run(scenario, folder, plans, latches)
        assert outcome.result == self._expected[scenario.name], "the stream is another one"
        # One that dies after its last message is not missed, so its death may go unseen.
        last = sum(kill.point.name in _LAST for kill in kills)
        assert outcome.fired - last <= outcome.deaths <= outcome.fired + scenario.own_deaths, (
            f"{outcome.fired} kills, {outcome.deaths} deaths"
        )
        return outcome.fired

    # ── one run ─────────────────────────────────────────────────────────────────────────────

    def _folder(self) -> Path:
        self._runs += 1
        folder = self.base / f"run-{self._runs}"
        folder.mkdir()
        return folder

    def _run(
        self, scenario: Scenario, folder: Path, plans: str, latches: tuple[Path, ...] | list[Path]
    ) -> Outcome:
        """Start the scenario, and again without faults until it is complete."""
        deaths = 0
        for number in range(_STARTS):
            one = scenario.job(folder, self.here)
            faults = f"{scenario.faults(folder)};{plans}" if number == 0 else ""
            process = start(folder, one, FINEWEB_FAULT=faults)
            family = _Family(process.pid)
            with family.watched():
                if number == 0:
                    scenario.conduct(process, folder)
                code, outcome, err = _end(process)
            family.check_gone()
            seen = sum(len(events(err, f"{who}_died")) for who in ("worker", "trainer", "writer"))
            deaths += seen + (code == -signal.SIGKILL)
            if code == 0:
                break
            assert code in (-signal.SIGKILL, 75, *scenario.codes), (
                f"{code}: {outcome}\n{err[-4000:]}"
            )
        else:
            raise AssertionError(f"not complete after {_STARTS} starts")
        _check_cache(folder / "cache")
        fired = sum(latch.exists() for latch in latches)
        return Outcome(scenario.result(folder, outcome["summary"]), fired, deaths)


class _Family:
    """Everything that a run ever started."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: dict[int, psutil.Process] = {}
        self._names_before = _shared_memory()

    @contextmanager
    def watched(self) -> Iterator[None]:
        import threading

        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                self._seen |= {child.pid: child for child in descendants(self._pid)}

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def check_gone(self) -> None:
        """No process and no shared-memory name outlives the supervisor by more than an instant."""
        _, alive = psutil.wait_procs(list(self._seen.values()), timeout=5)
        assert not alive, f"still alive: {alive}"
        names = _shared_memory() - self._names_before
        left = [name for name in names if any(f"_{pid}_" in name for pid in self._seen)]
        assert not left, f"left in /dev/shm: {left}"


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*")}


def _end(process: Any) -> tuple[int, dict[str, Any], str]:
    """Exit code, outcome and standard error; a killed supervisor has no outcome."""
    try:
        outcome, err = finish(process, timeout_s=400)
    except AssertionError:
        if process.returncode != -signal.SIGKILL:
            raise
        outcome, err = {}, ""
    return process.returncode, outcome, err


def _check_cache(folder: Path) -> None:
    """A complete run has no file of an unfinished fetch."""
    left = [path.name for path in folder.glob("*") if path.name.endswith(".partial")]
    assert not left, f"left in the cache: {left}"
    strange = [
        path.name
        for path in folder.glob("*")
        if cache.parse(path.name) is None and path.name != cache.LOCK_FILE
    ]
    assert not strange, f"strange in the cache: {strange}"


# ── the whole matrix ────────────────────────────────────────────────────────────────────────


def batches(cover: dict[Point, Scenario], count: int) -> Iterator[tuple[Scenario, list[Kill]]]:
    """The kills of one round, in runs of several where they do not get in each other's way.

    Three deaths at one block end a run, so a run takes two of a role; the supervisor's death, and
    one behind a role's last message, are runs of their own. The consumer's death ends a generation,
    and a worker that dies at that moment is not counted: they do not share a run.
    """
    waiting: dict[tuple[str, bool], list[Kill]] = {}
    for point, scenario in cover.items():
        kill = Kill(point, count)
        if point.role == SUPERVISOR or point.name in _LAST or scenario.once:
            yield scenario, [kill]
        else:
            consumer = point.role in ("writer", "trainer")
            waiting.setdefault((scenario.name, consumer), []).append(kill)
    for (name, _), kills in waiting.items():
        while kills:
            taken: Counter[str] = Counter()
            batch = []
            for kill in list(kills):
                if taken[kill.point.role] < _PER_BATCH[kill.point.role]:
                    taken[kill.point.role] += 1
                    batch.append(kill)
                    kills.remove(kill)
            yield SCENARIOS[name], batch


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, choices=range(1, len(PASSINGS) + 1))
    parser.add_argument("--only", default="", help="only points like this: writer, send:Log")
    options = parser.parse_args()
    begin, kills, failures = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as name, world(Path(name)) as here:
        all_of_it = Matrix(Path(name), here)
        cover = all_of_it.cover()
        missing = sorted(set(matrix()) - set(cover))
        for point in missing:
            print(f"NEVER PASSED  {point.role} {point.name}", flush=True)
        wanted = {p: s for p, s in cover.items() if options.only in f"{p.role} {p.name}"}
        for count in PASSINGS[: options.rounds]:
            for scenario, batch in batches(wanted, count):
                try:
                    fired = all_of_it.check(scenario, batch)
                    said = f"held, {fired} of {len(batch)} kills"
                except AssertionError as error:
                    fired, said = len(batch), f"FAILED: {error}"
                    failures += 1
                kills += fired
                points = ", ".join(f"{k.point.role} {k.point.name}" for k in batch)
                seconds = time.monotonic() - begin
                print(
                    f"{seconds:6.0f} s  passing {count}  {scenario.name}: {points}: {said}",
                    flush=True,
                )
    print(
        f"{kills} kills, {failures} failures, {len(missing)} of {len(matrix())} points never passed"
    )
    return 1 if failures or missing else 0


if __name__ == "__main__":
    sys.exit(main())
