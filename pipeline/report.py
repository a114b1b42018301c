"""What the run shows: status for the view, events for the log, peaks for the summary.

Runs in: supervisor. Reads the scheduler's state, decides nothing.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline import checkpoints, status_file, watch
from pipeline.cores import Cores
from pipeline.errors import ExitCode
from pipeline.log import RunLog
from pipeline.messages import CheckpointWritten
from pipeline.power import Power
from pipeline.redaction import scrub_fields
from pipeline.state import FileState, State, Worker
from pipeline.status import Curve, DiskStatus, StageStatus, Status, View, is_shown, note
from pipeline.trackers import Tracker
from pipeline.verdict import Witness

if TYPE_CHECKING:
    from pipeline.generation import Generation
    from pipeline.supervisor import Job

_MEMORY_EVERY_S = 1.0
_RATE_WINDOW_S = 5.0
_NEWEST = 50  # updates whose pace says how long the rest will take
_NOTES = 4  # newest events that the picture shows

# The first message of each kind marks a point of the way to the first batch.
_LAST = "first_batch"
_MILESTONES = {
    "Hello": "first_worker_up",
    "ShardFetched": "first_shard_fetched",
    "BlockFilled": "first_block_read",
    "Encoded": "first_block_encoded",
    "ConsumerReady": "consumer_ready",
    "BatchTaken": _LAST,
}


class _Rate:
    """Increase per second of a running total, over the last few seconds."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []

    def add(self, now: float, total: float) -> float:
        self._points.append((now, total))
        while now - self._points[0][0] > _RATE_WINDOW_S and len(self._points) > 1:
            self._points.pop(0)
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 and n1 >= n0 else 0.0


class Reporter:
    """Feeds the view and the log files.

    Args:
        job: The run.
        view: Where the user looks.
        log: The run's log files.
        lanes: Number of lanes.
        started: time.monotonic() at the start of the run.
    """

    def __init__(self, job: Job, view: View, log: RunLog, lanes: int, started: float) -> None:
        self.job, self.view, self.log, self.started = job, view, log, started
        self.generation: Generation | None = None
        self.earlier_restarts = 0  # of the consumer, and of workers of earlier generations
        self.peak_disk_bytes = 0
        self.peak_rss_bytes = 0
        self.metrics: dict[str, Any] = {}
        self.startup_s = {"shards_listed": self._elapsed_s()}  # milestones up to the first batch
        self._cpu_s: dict[str, float] = {}
        self.trackers: Sequence[Tracker] = ()
        self.other_bytes = 0  # of the validation tokens' folder
        self.budget_bytes = int(job.config.data.stream.max_disk_gb * 1e9)
        self._picture: Status | None = None  # a quarter of a second old at most
        self._power = Power()
        self._watts: float | None = None
        self._cores = Cores()
        self._idle_cores: float | None = None
        self.witness = Witness(job.kind, self._cores.usable)
        self._losses = Curve()
        self._newest_s: deque[float] = deque(maxlen=_NEWEST)
        self._first_step: int | None = None  # updates before this run's first one
        self._notes: deque[str] = deque(maxlen=_NOTES)
        self.url: str | None = None  # of the live page
        self._file_at = 0.0
        self._ended: status_file.Ended | None = None
        self._me = status_file.this_process()
        run_dir = Path(job.run_dir)  # held-out tokens are made for the run two folders above
        self._folder = run_dir.parent.parent if job.held_out else run_dir
        self._checkpoint_bytes = 0
        self._lanes = lanes
        self._rates: dict[str, _Rate] = {}
        self._memory_at = 0.0
        self._shared_bytes = 0
        self._total_steps = (
            job.config.training.hyperparameters.iters if job.kind == "train" else None
        )

    def begin(self, generation: Generation, shared_bytes: int) -> None:
        """Another generation takes over, with so much shared memory."""
        self._shared_bytes = shared_bytes
        self.earlier_restarts = self.restarts
        self.generation = generation

    @property
    def restarts(self) -> int:
        """Processes that died and were started again, in this run."""
        state = self._state()
        workers = state.workers.values() if state else ()
        return self.earlier_restarts + sum(worker.restarts for worker in workers)

    # ── what happens ────────────────────────────────────────────────────────────────────────

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Something has happened: to the log file and to the view, without secrets."""
        fields = scrub_fields(fields)
        self.log.event(level, event, **fields)
        if is_shown(level, event):
            self._notes.append(note(event, fields))
        self.view.event(level, event, **fields)
        self.disk()

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def heard(self, kind: str) -> None:
        """A message of this kind has come; the first of some kinds are milestones."""
        name = _MILESTONES.get(kind)
        if name is not None and name not in self.startup_s and _LAST not in self.startup_s:
            self.startup_s[name] = self._elapsed_s()

    def reaped(self, role: str, cpu_s: float) -> None:
        """A process has ended."""
        self._cpu_s[role] = self._cpu_s.get(role, 0.0) + cpu_s

    def cpu_s_by_role(self) -> dict[str, float]:
        """CPU seconds of the processes that have ended, by what they were."""
        return {role: round(cpu_s, 3) for role, cpu_s in sorted(self._cpu_s.items())}

    def step(self, metrics: dict[str, Any]) -> None:
        """The consumer's metrics of one update."""
        self.metrics = metrics
        if self.job.kind == "train":
            self._losses.add(float(metrics["loss"]))
            self._newest_s.append(float(metrics["step_s"]))
            if self._first_step is None:
                self._first_step = int(metrics["step"]) - 1
            self.witness.update(float(metrics["step_s"]), float(metrics["data_wait_share"]))
            disk = self.disk()
            record = {**metrics, **self._surroundings(disk)}
            self.log.step(record, disk)
            for tracker in self.trackers:
                tracker.step(record)
            self.view.event("info", "step_done", **metrics)

    def _surroundings(self, disk: DiskStatus) -> dict[str, Any]:
        """What stands beside an update's own metrics: disk, stages as last measured, power."""
        said: dict[str, Any] = {
            f"disk_{name}_bytes": getattr(disk, f"{name}_bytes")
            for name in ("used", "budget", "cached", "reserved", "checkpoint", "log")
        }
        for stage in self._picture.stages if self._picture else ():
            said[f"{stage.name}_busy"] = round(stage.busy, 4)
            per_s = "tokens" if stage.unit == "tok/s" else "bytes"
            said[f"{stage.name}_{per_s}_per_s"] = round(stage.rate)
        if self._picture and self.generation:
            said["ring_fill"] = round(self._picture.ring_fill, 4)
            said["limiting_stage"] = self.generation.scheduler.limiting()
        if self._watts is not None:
            said["power_w"] = round(self._watts, 1)
        return said

    def checkpoint_written(self, message: CheckpointWritten) -> None:
        self._checkpoint_bytes = message.size_bytes
        self.event(
            "info",
            "checkpoint_written",
            step=message.step,
            path=message.path,
            size_bytes=message.size_bytes,
        )

    def checkpoints(self, run_dir: Path) -> None:
        """Count the checkpoints that lie on the disk."""
        self._checkpoint_bytes = checkpoints.size_bytes(run_dir)

    # ── status ──────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """A quarter of a second has passed: show where things stand."""
        now = time.monotonic()
        if now - self._memory_at >= _MEMORY_EVERY_S:
            self._memory_at = now
            self._measure_memory()
            self._watts = self._power.watts()
            self._idle_cores = self._cores.idle()
        if self.generation is not None and self.generation.consuming.facts:
            self.witness.saw(self.generation.scheduler.limiting())
        self._show(now)

    def _show(self, now: float) -> None:
        """To the view, and now and then into the run's folder."""
        self._picture = self.status()
        self.view.update(self._picture)
        if self._ended is not None or now - self._file_at >= status_file.WRITE_EVERY_S:
            self._file_at = now
            seen = status_file.Recorded(self._me, time.time(), self._picture, self._ended)
            status_file.write(self._folder, seen)

    def disk(self) -> DiskStatus:
        """Bytes on disk, reservations of fetches under way counted in full; notes the peak."""
        state = self._state()
        files = state.files_in_use() if state else []
        cached = [f for f in files if f.state is FileState.CACHED and f.reserved_bytes]
        cached_bytes = sum(file.reserved_bytes for file in cached)
        reserved = sum(file.reserved_bytes for file in files) - cached_bytes
        writing = self.generation.consuming.writing_bytes if self.generation else 0
        checkpoint_bytes = self._checkpoint_bytes + writing
        log_bytes = self.log.bytes + self.other_bytes + sum(one.bytes for one in self.trackers)
        used = cached_bytes + reserved + checkpoint_bytes + log_bytes
        self.peak_disk_bytes = max(self.peak_disk_bytes, used)
        return DiskStatus(
            budget_bytes=self.budget_bytes,  # 0: no shard at all
            used_bytes=used,
            cached_bytes=cached_bytes,
            reserved_bytes=reserved,
            checkpoint_bytes=checkpoint_bytes,
            log_bytes=log_bytes,
            peak_bytes=self.peak_disk_bytes,
            evicted_bytes=state.evicted_bytes if state else 0,
            evicted_shards=state.evicted_shards if state else 0,
            cached_shards=len(cached),
        )

    def status(self) -> Status:
        """Everything that a view shows."""
        state, generation = self._state(), self.generation
        metrics = self.metrics
        ready = bool(generation and generation.consuming.facts)
        return Status(
            name=self.job.config.name,
            kind=self.job.kind,
            phase="running" if ready else "starting",
            elapsed_s=time.monotonic() - self.started,
            step=int(metrics.get("step", 0)),
            total_steps=self._total_steps,
            metrics=metrics,
            stages=self._stages(state) if state else (),
            ring_fill=self._ring_fill(state) if state else 0.0,
            disk=self.disk(),
            bad_records=generation.scheduler.filling.bad_records if generation else 0,
            restarts=self.restarts,
            verdict=self._verdict(),
            first_step=self._first_step or 0,
            losses=self._losses.points(),
            notes=tuple(self._notes),
            url=None if self._ended else self.url,
            step_s=fmean(self._newest_s) if self._newest_s else None,
        )

    def _state(self) -> State | None:
        return self.generation.scheduler.state if self.generation else None

    @staticmethod
    def _ring_fill(state: State) -> float:
        ring = state.plan.ring
        room = ring.slots * ring.slot_tokens * len(state.lanes)
        held = sum(
            max(0, lane.placed - max(lane.base, lane.released * ring.slot_tokens))
            for lane in state.lanes
        )
        return min(1.0, held / room)

    def _stages(self, state: State) -> tuple[StageStatus, ...]:
        generation = self.generation
        assert generation is not None
        now = time.monotonic()
        fetching = sum(f.have_bytes for f in state.files_in_use() if f.state is FileState.FETCHING)
        cached = sum(
            1
            for lane in state.lanes
            for run in lane.runs
            if run.attached and state.files[run.shard].state is FileState.CACHED
        )
        rows = [
            (
                "fetch",
                "fetcher",
                "B/s",
                state.fetched_bytes + fetching,
                cached,
                len(state.lanes) * (1 + state.plan.prefetch),
            ),
            (
                "decompress",
                "decompressor",
                "B/s",
                sum(lane.text_bytes for lane in state.lanes),
                state.plan.text_slots - len(state.free_slots),
                state.plan.text_slots,
            ),
            (
                "tokenize",
                "tokenizer",
                "tok/s",
                generation.scheduler.placing.tokens,
                sum(len(w.queue) for w in state.workers.values() if w.role == "tokenizer"),
                2 * state.plan.workers["tokenizer"],
            ),
        ]
        return tuple(
            StageStatus(
                name=name,
                workers=state.plan.workers[role],
                busy=self._busy_share(state, role, now),
                rate=self._rates.setdefault(name, _Rate()).add(now, total),
                unit=unit,
                queue=queue,
                capacity=capacity,
                restarts=sum(w.restarts for w in state.workers.values() if w.role == role),
            )
            for name, role, unit, total, queue, capacity in rows
        )

    def _busy_share(self, state: State, role: str, now: float) -> float:
        """Share of the last seconds that the role's workers had work."""

        def busy(worker: Worker) -> float:
            since = worker.busy_since
            return worker.busy_s + (max(0.0, now - since) if since is not None else 0.0)

        workers = [worker for worker in state.workers.values() if worker.role == role]
        total = sum(busy(worker) for worker in workers)
        return min(1.0, self._rates.setdefault(role, _Rate()).add(now, total) / len(workers))

    def _verdict(self) -> str:
        """What limits the run now, in words; of one that has ended, what has limited it."""
        if self._ended is not None:
            return self.verdict_of_all()
        if self.generation is None or not self.generation.consuming.facts:
            return "starting"
        stages = self._picture.stages if self._picture else ()
        return self.witness.now(stages, self._idle_cores)

    def verdict_of_all(self) -> str:
        """What has limited the whole run."""
        stages = self._picture.stages if self._picture else ()
        return self.witness.whole(stages, self._idle_cores)

    def _measure_memory(self) -> None:
        """Memory of all processes: what is each one's alone, and the shared segments once.

        Not the kernel's proportional share: that takes it 10 to 30 ms a process, in which the
        supervisor hears nobody.
        """
        children = self.generation.children.values() if self.generation else ()
        pids = [os.getpid(), *(child.pid for child in children)]
        total = self._shared_bytes + sum(watch.memory_bytes(pid) for pid in pids)
        self.peak_rss_bytes = max(self.peak_rss_bytes, total)

    def ended(self, code: ExitCode, what: str = "", remedy: str = "") -> None:
        """The run has ended: so its folder says from now on."""
        if not self.job.held_out or code is not ExitCode.OK:
            self._ended = status_file.Ended(int(code), what, remedy)

    def close(self) -> None:
        self._show(time.monotonic())
        for tracker in self.trackers:
            tracker.close()
