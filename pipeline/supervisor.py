"""A whole run: catalog, budget, generations, signals, and what is left behind.

Runs in: supervisor.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from pipeline import (
    blueprint,
    budget,
    cache,
    catalog,
    checkpoints,
    costs,
    encoding,
    filters,
    held_out,
    identity,
    manifest,
    meeting,
    mixture,
    serving,
    sizes,
    status_file,
    trackers,
)
from pipeline.config import Config, to_plain, without_secrets
from pipeline.errors import (
    BudgetError,
    ConfigError,
    ExitCode,
    FinewebError,
    PeerLostError,
    StoppedError,
    WorkerCrashError,
    disk_error,
)
from pipeline.generation import ConsumerDiedError, Generation, Hooks, Setup, evict_files
from pipeline.listing import Watch
from pipeline.log import RunLog
from pipeline.meeting import Meeting
from pipeline.messages import (
    CheckpointWritten,
    ConsumerDone,
    Cursor,
    DecompressorSetup,
    FetcherSetup,
    LaneCursor,
    Message,
    RingLayout,
    TextLayout,
    TokenizerSetup,
    TrainerSetup,
    WriterSetup,
)
from pipeline.ranks import Rank, Share
from pipeline.report import Reporter
from pipeline.serving import Serving
from pipeline.state import Plan
from pipeline.status import View
from pipeline.workers import writer
from shm import ring, segment, text

_SMALL_FILES_BYTES = 1 << 18  # lock, status and configuration: beside the logs
_SAY_S = 5.0  # between lines on a listing that takes long
_MAX_CONSUMER_DEATHS = 3  # without a new checkpoint in between


class Job(msgspec.Struct, frozen=True):
    """Everything a run needs. run_dir is the --out folder for tokenize."""

    kind: Literal["train", "tokenize"]
    config: Config
    run_dir: str
    cache_dir: str
    fresh: bool = False
    limit_tokens: int | None = None
    file_tokens: int = 100_000_000
    held_out: bool = False  # of the documents that training does not see
    rank: Rank = Rank()
    shards: tuple[catalog.Shard, ...] = ()  # looked up already; else the configuration's
    cpus: int | None = None  # that it may use; None: all


class Outcome(msgspec.Struct, frozen=True):
    """How the run ended."""

    complete: bool
    exit_code: int
    summary: dict[str, Any]


def run(job: Job, view: View) -> Outcome:
    """Run a job to its end, or to Ctrl-C.

    Raises:
        FinewebError: what went wrong, where, and what to do.
    """
    run_dir, cache_dir = Path(job.run_dir), Path(job.cache_dir)
    folders = {folder.resolve(): folder for folder in (run_dir, cache_dir)}
    try:
        with ExitStack() as stack:
            locks = [stack.enter_context(cache.own(folder)) for folder in folders.values()]
            stops = stack.enter_context(stop_signals())
            others = stack.enter_context(
                meeting.of(job.rank, job.config.ranks, lambda: stops.count)
            )
            server = stack.enter_context(serving.of(job))
            if job.fresh:
                _start_over(job, run_dir)
            own = (view, stops, locks, server, others)
            return _hold_out(job, *own) or _Run(job, *own).run()
    except OSError as error:
        known = disk_error(error, "the supervisor")
        if known is None:
            raise
        raise known from error


def _hold_out(
    job: Job, view: View, stops: Stops, lock_fds: list[int], server: Serving, others: Meeting
) -> Outcome | None:
    """Make the validation tokens if they are wanted and not there; an outcome if that was
    stopped. Rank 0 alone validates."""
    if job.kind != "train" or not held_out.wanted(job.config) or job.rank.number:
        return None
    inner = held_out.job_for(job)
    if held_out.is_ready(inner):
        return None
    Path(inner.run_dir).mkdir(parents=True, exist_ok=True)
    outcome = _Run(inner, view, stops, lock_fds, server, others).run()
    return None if outcome.complete else outcome


def _start_over(job: Job, run_dir: Path) -> None:
    """Forget an earlier run; the command line has asked."""
    shutil.rmtree(run_dir / checkpoints.FOLDER, ignore_errors=True)
    shutil.rmtree(run_dir / held_out.FOLDER, ignore_errors=True)
    patterns = ["log.txt*", "metrics.jsonl*", "bad_records.jsonl*"]
    patterns += [catalog.FILE_NAME, status_file.FILE]
    if job.kind == "tokenize":
        patterns += [writer.STATE_FILE, "tokens_*.bin", "tokens_*.bin.partial"]
    for pattern in patterns:
        for path in run_dir.glob(pattern):
            path.unlink()


def fixed_bytes(job: Job) -> int:
    """Bytes of the budget that logs, trackers, validation tokens and small files may take."""
    size = int(job.config.logging.max_log_mb * 1e6) + _SMALL_FILES_BYTES
    if job.kind == "train":
        size += held_out.disk_bytes(job.config) + trackers.disk_bytes(job.config)
    return size


class Stops:
    """Counts requests to stop; readable wakes the event loop."""

    def __init__(self) -> None:
        self.count = 0
        self.readable, self.writable = socket.socketpair()
        self.readable.setblocking(False)
        self.writable.setblocking(False)

    def __call__(self, number: int, frame: object) -> None:
        self.count += 1


@contextmanager
def stop_signals() -> Iterator[Stops]:
    """SIGINT, SIGTERM and SIGHUP only count; the event loop acts. One that whoever started us
    has switched off (nohup, a shell's background job) stays off."""
    stops = Stops()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stops) for number in heeded}
    wakeup = signal.set_wakeup_fd(stops.writable.fileno(), warn_on_full_buffer=False)
    try:
        yield stops
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        stops.readable.close()
        stops.writable.close()


class _Run:
    """One run: what stays the same over its generations."""

    def __init__(
        self,
        job: Job,
        view: View,
        stops: Stops,
        lock_fds: list[int],
        server: Serving,
        others: Meeting,
    ) -> None:
        self.job, self.config, self.view, self.stops = job, job.config, view, stops
        self.lock_fds, self.server, self.others = lock_fds, server, others
        # the budget and the processors are a host's: its ranks share them
        here = 1 if job.held_out else others.on_this_host
        self.stream = job.config.data.stream
        self.run_dir, self.cache_dir = Path(job.run_dir), Path(job.cache_dir)
        self.started = time.monotonic()
        log_bytes = int(self.config.logging.max_log_mb * 1e6)
        self.log = RunLog(self.run_dir, log_bytes)
        self.fixed_bytes = fixed_bytes(job)
        self.zero_disk = self.stream.max_disk_gb == 0
        own_bytes = int(self.stream.max_disk_gb * 1e9) // here
        self.budget_bytes = blueprint.NO_LIMIT if self.zero_disk else own_bytes
        self.source_options = self.stream.source_options()
        tokenizer = self.config.data.tokenizer
        vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)  # its errors first
        self.eot, self.token_bytes = vocabulary.eot, vocabulary.dtype.itemsize
        if self.stream.mix and job.kind == "tokenize":
            raise ConfigError(
                "data.stream.mix: only training mixes data sets",
                "tokenize each of them by itself, with --shards and an --out of its own",
            )
        self.shards, self.set_sizes, listed = self._catalog(self.source_options)
        self.groups = mixture.groups(self.config, self.set_sizes)
        self.lanes = sum(group.lanes for group in self.groups)  # of all ranks
        self.share = Share(self.lanes, job.rank)
        if not job.held_out:
            names = [shard.name for shard in self.shards]
            held_out.check_apart(self.config, names, self.source_options)
        self.identity = identity.identity(
            self.config,
            self.shards,
            self.lanes,
            mix=mixture.described(self.groups),
            held_out=job.held_out,
        )
        cost = costs.of(
            self.shards[0].name,
            lambda: encoding.load(tokenizer.name, tokenizer.vocab_size),
            costs.kind_of(self.config, vocabulary.size),
        )
        cpus = job.cpus or max(1, sizes.usable_cpus() // here)
        self.sizes = sizes.split(cpus, job.kind, self.stream, cost)
        self.reporter = Reporter(job, view, self.log, len(self.share.lanes), self.started)
        self.reporter.other_bytes = listed["kept_bytes"]
        self.reporter.budget_bytes = own_bytes
        self.reporter.event("info", "shards_listed", **listed)
        if self.zero_disk and self.stream.manifest is not None:
            why = "with --max-disk 0 a shard is used before all of it is there"
            self.reporter.event("warning", "sha256_not_checked", why=why)
        if job.kind == "train":
            plain = to_plain(without_secrets(self.config))
            (self.run_dir / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
            self.reporter.other_bytes += held_out.size_bytes(self.run_dir)
            self.reporter.trackers = trackers.make(self.config, self.run_dir, plain)
        if server.url is not None:
            self.reporter.url = server.url
            self.reporter.event("info", "serving_status", url=server.url)
        self.reporter.event("info", "workers_chosen", **msgspec.structs.asdict(self.sizes))

    def _catalog(
        self, options: dict[str, Any]
    ) -> tuple[tuple[catalog.Shard, ...], tuple[int, ...], dict[str, Any]]:
        """The shards, kept beside the run for its next start, how many each data set has, and
        what to say of them."""
        begin, event = time.monotonic(), self.view.event
        watch = Watch(
            lambda done, total: event("info", "listing_shards", done=done, total=total),
            lambda why, wait_s: event(
                "warning", "listing_tried_again", why=why, wait_s=round(wait_s, 1)
            ),
            _SAY_S,
        )
        path = self.stream.manifest
        given = None if path is None or self.job.shards else manifest.read(Path(path))
        folder = self.run_dir.parents[1] if self.job.held_out else self.run_dir
        kept = catalog.read_kept(folder)
        known = catalog.Known(given, kept)
        shards: tuple[catalog.Shard, ...] = self.job.shards
        set_sizes: tuple[int, ...] = (len(shards),)
        if not shards:
            shards, set_sizes = mixture.read(self.stream, options, known, watch)
        listed_s = time.monotonic() - begin
        kept_bytes, peak_bytes = catalog.size_bytes(folder, shards)
        self.fixed_bytes += peak_bytes
        to_fetch = [shard for shard in shards if catalog.local_path(shard.url) is None]
        budget.refuse_too_small(
            self.budget_bytes,
            fixed_bytes=self.fixed_bytes,
            checkpoint_bytes=0,
            floor=max((shard.size_bytes or 0 for shard in to_fetch), default=0),
            lanes=-(-min(self.stream.lanes, len(shards)) // self.job.rank.size),
        )
        catalog.keep(folder, shards)
        return (
            shards,
            set_sizes,
            {
                "shards": len(shards),
                "size_bytes": sum(shard.size_bytes or 0 for shard in shards),
                "listed_s": round(listed_s, 3),
                "known_from_before": kept is not None
                and all(s.name in kept.entries for s in shards),
                "kept_bytes": kept_bytes,
            },
        )

    # ── the whole run ───────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        try:
            outcome = self._outcome(self._generations())
            if self.job.kind == "tokenize":  # the writer's last word came before its last tokens
                said = outcome.summary
                self.reporter.step({"total_tokens": said["tokens"], "documents": said["documents"]})
            self.reporter.ended(ExitCode(outcome.exit_code))
            return outcome
        except FinewebError as error:
            here = self.others.on_this_host
            if isinstance(error, BudgetError) and here > 1 and not self.job.held_out:
                error.remedy += f"; {here} times that, since the ranks of a host share it"
            self.reporter.ended(error.exit_code, error.what, error.remedy)
            raise
        finally:
            self.reporter.close()
            self.log.close()

    def _generations(self) -> ConsumerDone:
        """Generations until one ends; the consumer's death starts the next from what is durable."""
        deaths, last = 0, None
        while True:
            cursor, checkpoint, checkpoint_bytes = self._resume_point()
            deaths = 0 if cursor != last else deaths
            last = cursor
            try:
                return self._generation(cursor, checkpoint, checkpoint_bytes)
            except ConsumerDiedError as death:
                deaths += 1
                role = "trainer" if self.job.kind == "train" else "writer"
                if self.job.rank.size > 1 and not self.job.held_out:
                    # those of the other ranks cannot go on without it: all start again
                    raise self.others.explained(
                        PeerLostError(
                            f"the {role} of rank {self.job.rank.number} died by {death.how}",
                            "the same command resumes all ranks from the last checkpoint",
                        )
                    ) from None
                if deaths > _MAX_CONSUMER_DEATHS:
                    raise WorkerCrashError(
                        f"the {role} died {deaths} times without a new checkpoint, the last "
                        f"time by {death.how}",
                        "see log.txt; the same command resumes from the last checkpoint",
                    ) from None
                self.reporter.event("warning", f"{role}_died", how=death.how)
                self.reporter.earlier_restarts += 1

    def _resume_point(self) -> tuple[Cursor, str | None, int]:
        """Where the data stands, the checkpoint to restore, and the bytes of one checkpoint."""
        cursor: Cursor | None = None
        path, size = None, 0
        if self.job.kind == "tokenize":
            if state := writer.read_state(self.run_dir):
                cursor = state.cursor
        elif latest := checkpoints.latest(self.run_dir):
            cursor, path, size = latest.cursor, str(latest.path), latest.size_bytes
        if self.job.kind == "train":
            cursor = meeting.agreed(self.others, self.config, self.identity, cursor)
        if cursor is None:
            start = (LaneCursor(0, 0, 0, 0),) * self.lanes
            return Cursor(identity.fingerprint(self.identity), self.identity, start), None, 0
        identity.refuse_other(cursor, self.identity, path or str(self.run_dir))
        self.reporter.event("info", "resuming", tokens=sum(lane.position for lane in cursor.lanes))
        return cursor, path, size

    # ── one generation ──────────────────────────────────────────────────────────────────────

    def _generation(self, whole: Cursor, checkpoint: str | None, size: int) -> ConsumerDone:
        cursor, lanes = self.share.cursor(whole), len(self.share.lanes)
        stream = self.stream
        ring_layout = blueprint.ring_layout(self.config, lanes, self.token_bytes)
        text_layout = blueprint.text_layout(stream, lanes, self.sizes.tokenizers)
        positions = tuple(lane.position for lane in whole.lanes)
        kept = checkpoints.most(self.config)
        self.reporter.checkpoints(self.run_dir)
        text_fd = segment.create(text.size_bytes(text_layout))
        ring_fd = segment.create(ring.size_bytes(ring_layout))
        try:
            generation = Generation(
                plan=self._plan(cursor, ring_layout, text_layout.slots),
                setup=self._setup(cursor, checkpoint, ring_layout, text_layout, positions),
                hooks=self._hooks(),
                stream=stream,
                text_fd=text_fd,
                ring_fd=ring_fd,
                lock_fds=self.lock_fds,
                checkpoint_bytes=self._checkpoint_bytes(size, kept),
                checkpoints_kept=kept,
            )
            shared_bytes = text.size_bytes(text_layout) + ring.size_bytes(ring_layout)
            self.reporter.begin(generation, shared_bytes)
            try:
                return generation.run(*self._cached(), self.stops.readable.fileno())
            except PeerLostError:
                raise
            except StoppedError as error:  # perhaps the trainer has seen first that one is lost
                raise self.others.explained(error) from None
            finally:
                if generation.consuming.done is not None and not self.job.held_out:
                    self.others.leave(settled=True)
        finally:
            os.close(text_fd)
            os.close(ring_fd)

    def _checkpoint_bytes(self, size: int, kept: int) -> int | None:
        if self.job.kind == "tokenize":
            return 0
        # an earlier run may have been allowed to keep more: the trainer deletes them first
        return max(size * (kept + 1), checkpoints.size_bytes(self.run_dir)) or None

    def _plan(self, cursor: Cursor, ring_layout: RingLayout, text_slots: int) -> Plan:
        return blueprint.plan(
            self.config,
            self.shards,
            self.share.plan(mixture.plan(self.config, self.shards, self.set_sizes, self.groups)),
            self.groups,
            self.sizes,
            ring_layout,
            owned=tuple(self.share.lanes),
            budget_bytes=self.budget_bytes,
            text_slots=text_slots,
            cache_dir=str(self.cache_dir),
            fixed_bytes=self.fixed_bytes,
            cursor=cursor,
        )

    def _setup(
        self,
        cursor: Cursor,
        checkpoint: str | None,
        ring_layout: RingLayout,
        text_layout: TextLayout,
        positions: tuple[int, ...],
    ) -> Setup:
        tokenizer = self.config.data.tokenizer
        consumer: Message
        if self.job.kind == "train":
            consumer = TrainerSetup(
                ring_layout,
                positions,
                to_plain(without_secrets(self.config)),
                str(self.run_dir),
                checkpoint,
                self._validation_file(),
                self.groups,
                self.job.rank.number,
                self.job.rank.size,
            )
        else:
            consumer = WriterSetup(
                ring=ring_layout,
                positions=positions,
                seq_len=self.config.data.preprocessing.max_context_size,
                out_dir=str(self.run_dir),
                eot=self.eot,
                file_tokens=self.job.file_tokens,
                limit_tokens=self.job.limit_tokens,
                checkpoint_s=self.stream.writer_save_s,
            )
        return Setup(
            consumer_role="trainer" if self.job.kind == "train" else "writer",
            consumer=consumer,
            fetcher=FetcherSetup(str(self.cache_dir), self.source_options),
            decompressor=DecompressorSetup(
                text_layout,
                tokenizer.name,
                self.stream.text_field,
                self.config.data.validation.share,
                self.job.held_out,
                filters.condition(self.config.data.filter),
                self.config.data.filter.min_chars,
                self.config.data.filter.max_chars,
                self.source_options,
            ),
            tokenizer=TokenizerSetup(
                text_layout, ring_layout, tokenizer.name, tokenizer.vocab_size
            ),
            text=text_layout,
            base=cursor,
        )

    def _validation_file(self) -> str | None:
        if not held_out.wanted(self.config) or self.job.rank.number:
            return None
        return str(held_out.tokens_file(held_out.job_for(self.job)))

    def _hooks(self) -> Hooks:
        keys = [shard.key for shard in self.shards]
        return Hooks(
            event=self.reporter.event,
            step=self.reporter.step,
            tick=self._tick,
            stop_requested=lambda: max(self.stops.count, int(self.others.stopping)),
            checkpoint=self._checkpoint_written,
            evict=lambda shard: evict_files(self.cache_dir, keys[shard]),
            heard=self.reporter.heard,
            reaped=self.reporter.reaped,
        )

    def _tick(self) -> None:
        try:
            while self.stops.readable.recv(64):
                pass
        except BlockingIOError:
            pass
        self.others.check()
        generation = self.reporter.generation
        if generation is not None and generation.consuming.stopping_since is not None:
            self.others.stop_all()
        self.server.check(self.reporter.event)
        self.reporter.url = self.server.url
        self.reporter.tick()

    def _checkpoint_written(self, message: CheckpointWritten) -> None:
        self.reporter.checkpoint_written(message)

    def _cached(self) -> tuple[dict[int, tuple[str, int]], dict[int, int]]:
        """Shards of the catalog that the cache holds, whole and partial; other shards' files of
        ours are deleted."""
        contents = cache.scan(self.cache_dir)
        by_key = {shard.key: shard.index for shard in self.shards}
        complete: dict[int, tuple[str, int]] = {}
        partial: dict[int, int] = {}
        for key, entry in contents.complete.items():
            if key in by_key:
                complete[by_key[key]] = (str(entry.path), entry.size_bytes)
            else:
                evict_files(self.cache_dir, key)
        for key, size_bytes in contents.partial.items():
            if key in by_key and by_key[key] not in complete:
                partial[by_key[key]] = size_bytes
            else:
                (self.cache_dir / cache.partial_name(key)).unlink(missing_ok=True)
        return complete, partial

    # ── the end ─────────────────────────────────────────────────────────────────────────────

    def _outcome(self, done: ConsumerDone) -> Outcome:
        """What the run has done, from its own counts and the processes' accounts."""
        generation = self.reporter.generation
        assert generation is not None
        totals = generation.scheduler.totals()
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        own = usage[0].ru_utime + usage[0].ru_stime
        state = generation.scheduler.state
        summary = {
            **done.summary,
            "shards": totals.shards,
            "bad_records": totals.bad_records,
            "filtered": totals.filtered,
            "text_bytes": totals.text_bytes,
            "stream_tokens": sum(lane.position for lane in state.lanes),  # of that text
            "fetched_shards": state.fetched_shards,
            "evicted_shards": state.evicted_shards,
            "restarts": self.reporter.restarts,
            "processes": 2 + len(state.workers),
            "wall_s": round(time.monotonic() - self.started, 3),
            "cpu_s": round(sum(one.ru_utime + one.ru_stime for one in usage), 3),
            "cpu_s_by_stage": {"supervisor": round(own, 3), **self.reporter.cpu_s_by_role()},
            "startup_s": self.reporter.startup_s,
            "verdict": self.reporter.verdict_of_all(),
            "data_wait_share": self.reporter.witness.wait_share,
            "peak_disk_bytes": self.reporter.peak_disk_bytes,
            "peak_rss_bytes": self.reporter.peak_rss_bytes,
        }
        code = ExitCode.OK if done.complete else ExitCode.RESUME
        return Outcome(done.complete, int(code), summary)
