"""A campaign: real runs under random faults, held against an undisturbed one.

Runs in: chaos, which is the parent of every supervisor of the campaign.

    tokenize    rounds of one job to its end; each must give the sha256 of the undisturbed run
    train       one run for as long as the campaign lasts, stopped at its end; every update's batch
                hash must be that of the stream, which an undisturbed `tokenize` wrote down
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pipeline import demo
from pipeline.chaos import jobs
from pipeline.chaos.inject import Injector
from pipeline.chaos.observe import Observer, children
from pipeline.chaos.server import FaultyServer, serving
from pipeline.errors import ExitCode

_SAMPLE_S = 1.0
_WARM_UP_S = 2.0  # a run that is just starting says nothing about memory
_STEP_S = 0.05
_QUIET_S = 180.0  # what is left to do once the faults are over has to be done in this time
_ENDINGS = 60  # errors after which a run may be started again
# Errors that faults may lead to, and what they say; the same command then goes on.
_EXPECTED = {
    ExitCode.CRASHED: "died",
    ExitCode.DATA: "has killed",
    ExitCode.SOURCE: "has killed",
    ExitCode.DISK: "No space left on device",
}


class BrokenPromiseError(Exception):
    """The campaign cannot go on: a run ended as none may."""


class Report(msgspec.Struct):
    """What a campaign did and found."""

    seed: int
    kind: str
    minutes: float
    faults: dict[str, int]  # by kind; planted ones are 'ACTION at POINT'
    kills: int  # processes that this campaign killed
    deaths: int  # deaths of workers that the supervisors saw
    supervisors: int  # how many were started
    endings: dict[str, int]  # how they ended, other than by being killed
    rounds: int  # tokenize: runs that were completed; train: updates that were checked
    tokens: int
    fetched_bytes: int  # bodies that the server sent to disturbed runs
    undisturbed_bytes: int  # what it sends for as many tokens without faults
    observed: dict[str, dict[str, float]]  # by quantity: first, last, max
    budget_bytes: int
    problems: list[str]
    folder: str | None = None  # kept when something was wrong

    @property
    def verdict(self) -> str:
        return "every promise held" if not self.problems else "a promise was broken"


class Campaign:
    """One campaign.

    Args:
        folder: For everything that the campaign writes.
        seed: Decides the faults.
        minutes: How long faults are injected.
        kind: tokenize or train.
        tell: Takes lines about the progress.
    """

    def __init__(
        self, folder: Path, seed: int, minutes: float, kind: str, tell: Callable[[str], None]
    ) -> None:
        self.folder, self.seed, self.minutes, self.kind = folder, seed, minutes, kind
        self.tell = tell
        self.problems: list[str] = []
        self.endings: Counter[str] = Counter()
        self.supervisors = self.deaths = self.killed_by_supervisor = self.rounds = 0
        self.tokens = self.undisturbed_bytes = self.reference_bytes = 0
        self._process: subprocess.Popen[bytes] | None = None

    # ── the whole campaign ──────────────────────────────────────────────────────────────────

    def run(self) -> Report:
        """Run it; on Ctrl-C everything is ended and what was found so far is reported."""
        corpus = self.folder / "corpus"
        facts = demo.make_corpus(corpus)
        self.tell(f"corpus: {facts['documents']} documents in {facts['shards']} shards")
        with serving(corpus) as server:
            self.job = jobs.Job(self.kind, self.folder, server.url, facts)
            self.metrics = jobs.MetricsReader(self.job.run_dir / "metrics.jsonl")
            self.observer = Observer(self.job.counted, self.job.budget_bytes)
            self.injector = Injector(self.seed, self.kind, server, self.job.cache_dir, self.folder)
            try:
                {"tokenize": self._tokenize, "train": self._train}[self.kind](server)
            except BrokenPromiseError as error:
                self.problems.append(str(error))
            except KeyboardInterrupt:
                self.problems.append("stopped before its end: not everything was checked")
            finally:
                self._end_process()
            return self._report(server)

    def _tokenize(self, server: FaultyServer) -> None:
        expected, per_round = self._reference(server, limit=None)
        deadline = time.monotonic() + 60 * self.minutes
        while time.monotonic() < deadline:
            self.job.start_over()
            summary = self._until_complete(deadline)
            self.rounds += 1
            self.tokens += summary["tokens"]
            self.undisturbed_bytes += per_round
            if summary["sha256"] != expected:
                self.problems.append(
                    f"round {self.rounds}: sha256 {summary['sha256']}, undisturbed {expected}"
                )
            self._check_clean()
            self.tell(f"round {self.rounds}: {summary['tokens']:,} tokens, sha256 compared")

    def _train(self, server: FaultyServer) -> None:
        deadline = time.monotonic() + 60 * self.minutes
        self._until_complete(deadline, stop_at_deadline=True)
        self._check_clean()
        hashes = self.metrics.hashes
        self.rounds = len(hashes.by_step)
        self.problems += hashes.problems
        if not hashes.by_step:
            raise BrokenPromiseError("no update was made")
        last = max(hashes.by_step)
        self.tokens = last * jobs.UPDATE_TOKENS
        self.tell(f"{last} updates; comparing their batches with an undisturbed stream")
        windows = (last + 1) * jobs.UPDATE_TOKENS + jobs.LANES * jobs.SEQ_LEN
        _, self.undisturbed_bytes = self._reference(server, limit=windows)
        expected = jobs.reference_hashes(self.job.reference_dir, last)
        wrong = [step for step, said in sorted(hashes.by_step.items()) if said != expected[step]]
        if wrong:
            self.problems.append(f"{len(wrong)} updates had other batches, the first {wrong[0]}")
        lost = self.injector.planted()["full at log:before_write"]  # lines that met a full disk
        if len(hashes.by_step) < last - lost:
            self.problems.append(f"only {len(hashes.by_step)} of {last} updates were logged")

    def _reference(self, server: FaultyServer, limit: int | None) -> tuple[str, int]:
        """An undisturbed run: the sha256 of its stream, and the bytes that it fetched."""
        before, begin = server.sent_bytes, time.monotonic()
        command = self.job.reference(limit)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BrokenPromiseError(f"the undisturbed run failed: {done.stderr[-2000:]}")
        summary = msgspec.json.decode(done.stdout)
        self.tell(
            f"undisturbed: {summary['tokens']:,} tokens in {time.monotonic() - begin:.0f} s, "
            f"sha256 {summary['sha256'][:16]}…"
        )
        self.reference_bytes += server.sent_bytes - before
        return summary["sha256"], server.sent_bytes - before

    # ── one run, started as often as it takes ───────────────────────────────────────────────

    def _until_complete(self, deadline: float, *, stop_at_deadline: bool = False) -> Any:
        """Start the job until it is complete, or was stopped as asked; its summary."""
        overdue = deadline + _QUIET_S
        while True:
            code, killed = self._one_process(deadline, overdue, stop_at_deadline)
            self._check_gone()
            if killed:
                continue
            self.endings[f"exit code {code}"] += 1
            if code == ExitCode.OK or (
                code == ExitCode.RESUME and stop_at_deadline and time.monotonic() > deadline
            ):
                return msgspec.json.decode((self.folder / "out.json").read_bytes())
            expected = code in _EXPECTED and _EXPECTED[ExitCode(code)] in self._said()
            if code != ExitCode.RESUME and not expected:
                raise BrokenPromiseError(f"a run ended with code {code}: {self._said()}")
            if sum(self.endings.values()) > _ENDINGS + self.rounds:
                raise BrokenPromiseError(f"{_ENDINGS} endings, the last: {self._said()}")

    def _one_process(
        self, deadline: float, overdue: float, stop_at_deadline: bool
    ) -> tuple[int, bool]:
        """One supervisor from its start to its end. Returns its code, and whether we killed it."""
        faulty = time.monotonic() < deadline
        environment = os.environ | {"FINEWEB_FAULT": self.injector.plant() if faulty else ""}
        with (self.folder / "out.json").open("wb") as out, self._errors().open("wb") as err:
            process = subprocess.Popen(
                self.job.command(), stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                env=environment, process_group=0,
            )  # fmt: skip
        self._process = process
        self.supervisors += 1
        tree = psutil.Process(process.pid)
        killed = stopped = False
        sampled = time.monotonic() + _WARM_UP_S
        while process.poll() is None:
            now = time.monotonic()
            if now > overdue:
                raise BrokenPromiseError(
                    f"{_QUIET_S:.0f} s after the last fault the run has not ended: {self._said()}"
                )
            if now < deadline:
                if self.injector.due(now):
                    self.observer.remember(tree)
                killed = self.injector.step(tree) or killed
            else:
                self.injector.continue_all()
                if stop_at_deadline and not stopped and children(tree):  # it heeds signals
                    stopped = True
                    process.terminate()
            if now - sampled >= _SAMPLE_S:
                sampled = now
                self.observer.sample(tree)
                self.metrics.poll()
            time.sleep(_STEP_S)
        self.injector.continue_all()
        self.metrics.poll()
        self._count_deaths()
        return process.returncode, killed and process.returncode < 0

    def _errors(self) -> Path:
        return self.folder / f"stderr-{self.supervisors % 8}.txt"

    def _said(self) -> str:
        """The end of what the last supervisor wrote."""
        path = self.folder / f"stderr-{(self.supervisors - 1) % 8}.txt"
        return path.read_text(errors="replace")[-1500:]

    def _count_deaths(self) -> None:
        text = (self.folder / f"stderr-{(self.supervisors - 1) % 8}.txt").read_text(
            errors="replace"
        )
        self.deaths += sum(text.count(f"{who}_died") for who in ("worker", "trainer", "writer"))
        self.killed_by_supervisor += text.count("worker_killed")

    # ── checks ──────────────────────────────────────────────────────────────────────────────

    def _check_gone(self) -> None:
        """Everything ends with its supervisor; workers that are stopped, too."""
        left = self.observer.left_behind()
        self.problems += left
        self.observer.seen.clear()

    def _check_clean(self) -> None:
        """A run that is complete leaves no partial file."""
        for path in self.job.partial_files():
            self.problems.append(f"{path.name} is left after a complete run")

    def _report(self, server: FaultyServer) -> Report:
        planted = self.injector.planted()
        faults = dict(sorted((self.injector.counts + planted).items()))
        own_kills = self.injector.kills + sum(
            n for what, n in planted.items() if what.startswith("kill")
        )
        unexplained = self.deaths - own_kills - self.killed_by_supervisor
        problems = self.problems + self.observer.problems()
        if unexplained > 0:
            problems.append(f"{unexplained} workers died that nobody had killed")
        series = (
            self.observer.tree_memory,
            self.observer.supervisor_memory,
            self.observer.descriptors,
            self.observer.processes,
            self.observer.disk,
        )
        return Report(
            seed=self.seed,
            kind=self.kind,
            minutes=self.minutes,
            faults=faults,
            kills=own_kills,
            deaths=self.deaths,
            supervisors=self.supervisors,
            endings=dict(self.endings),
            rounds=self.rounds,
            tokens=self.tokens,
            fetched_bytes=server.sent_bytes - self.reference_bytes,
            undisturbed_bytes=self.undisturbed_bytes,
            observed={one.name: one.summary() for one in series},
            budget_bytes=self.job.budget_bytes,
            problems=problems,
        )

    def _end_process(self) -> None:
        """Whatever happens to the campaign, none of its processes stays."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.injector.continue_all()
        family = [psutil.Process(process.pid), *children(psutil.Process(process.pid))]
        for one in family:
            try:
                one.kill()
            except psutil.Error:
                continue
        process.wait()
