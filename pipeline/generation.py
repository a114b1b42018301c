"""One generation: the processes, segments and event loop from a cursor to an end.

Runs in: supervisor. First start, resume, and restart after the trainer's death are all this.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import spawn
from pipeline.config import Stream
from pipeline.consuming import Consuming, DiskFullError
from pipeline.errors import ExitCode, FinewebError, StoppedError
from pipeline.faults import faultpoint
from pipeline.messages import (
    CheckpointWritten,
    ConsumerDone,
    Cursor,
    DecompressorSetup,
    Failed,
    FetcherSetup,
    Hello,
    Log,
    Message,
    TextLayout,
    TokenizerSetup,
)
from pipeline.scheduler import CONSUMER, Scheduler
from pipeline.state import Command, Evict, Kill, Note, Plan, Send, Spawn
from pipeline.watch import RunningTime, Watch

TICK_S = 0.25
_STOP_WAIT_S = 600.0  # a consumer that was asked to stop gets this long for its checkpoint
_STDERR_BYTES = 1 << 16


class ConsumerDiedError(Exception):
    """The consumer's process ended without having finished."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


@dataclass(frozen=True)
class Setup:
    """What the first message to each kind of worker holds, and who the consumer is."""

    consumer_role: str
    consumer: Message
    fetcher: FetcherSetup
    decompressor: DecompressorSetup
    tokenizer: TokenizerSetup
    text: TextLayout
    base: Cursor


@dataclass
class Hooks:
    """What the generation tells the supervisor; called in the event loop."""

    event: Callable[..., None]  # (level, event, **fields)
    step: Callable[[dict[str, Any]], None]
    tick: Callable[[], None]
    stop_requested: Callable[[], int]  # 0: no, 1: cleanly, 2 and more: now
    checkpoint: Callable[[CheckpointWritten], None]
    evict: Callable[[int], None]  # delete a shard's files
    heard: Callable[[str], None]  # a message of this kind has come
    reaped: Callable[[str, float], None]  # (role, CPU seconds) of a process that has ended


class Generation:
    """Runs workers and consumer until the consumer has finished.

    Args:
        plan: Of the scheduler.
        setup: First messages.
        hooks: Callbacks.
        stream: The configuration's deadlines and limits.
        text_fd: Descriptor of the text segment.
        ring_fd: Descriptor of the ring segment.
        lock_fds: Descriptors of the folders' locks.
        checkpoint_bytes: Bytes set aside for checkpoints, if that is known already.
        checkpoints_kept: Checkpoints on disk beside the one being written.
    """

    def __init__(
        self,
        plan: Plan,
        setup: Setup,
        hooks: Hooks,
        stream: Stream,
        *,
        text_fd: int,
        ring_fd: int,
        lock_fds: Sequence[int],
        checkpoint_bytes: int | None,
        checkpoints_kept: int,
    ) -> None:
        self.setup, self.hooks = setup, hooks
        self.scheduler = Scheduler(plan, checkpoint_bytes)
        self.consuming = Consuming(
            self.scheduler, hooks, setup.base, checkpoints_kept, stream.disk_wait_s
        )
        self.children: dict[str, spawn.Child] = {}
        self._descriptors: dict[str, Any] = {
            "text_fd": text_fd,
            "ring_fd": ring_fd,
            "lock_fds": lock_fds,
        }
        self._watch = Watch(stream)
        self._now = RunningTime()
        self._selector = selectors.DefaultSelector()
        self._spawns: list[tuple[float, int, Spawn]] = []
        self._order = itertools.count()
        self._failed = False  # the scheduler has given up: only the consumer is heard
        self._ticked = 0.0

    def run(
        self, complete: dict[int, tuple[str, int]], partial: dict[int, int], wakeup_fd: int
    ) -> ConsumerDone:
        """Run to the end.

        Args:
            complete: shard → (path, size) of whole files in the cache.
            partial: shard → bytes of partial files in the cache.
            wakeup_fd: Readable when a signal has arrived.

        Raises:
            ConsumerDiedError: the trainer or writer was cut off.
            StoppedError: stop was asked for twice.
            FinewebError: the run cannot go on.
        """
        with ExitStack() as stack:
            stack.callback(self._end)
            self._selector.register(wakeup_fd, selectors.EVENT_READ, None)
            self._start(CONSUMER, self.setup.consumer_role)
            try:
                self._carry_out(self.scheduler.start(complete, partial))
                return self._until_done()
            except FinewebError as error:
                notes = [c for c in self.scheduler.state.commands if isinstance(c, Note)]
                self._carry_out(list(notes))  # what led to the error
                if self.consuming.facts and not isinstance(error, StoppedError | DiskFullError):
                    self._save_before(error)
                raise

    def _until_done(self) -> ConsumerDone:
        while self.consuming.done is None:
            self._wait()
            self._heed_stop()
        return self.consuming.done

    def _save_before(self, error: FinewebError) -> None:
        """The stream cannot go on: let the consumer save what it has consumed, then end."""
        self.hooks.event("error", "stream_ended", what=error.what)
        self._failed = True
        if CONSUMER not in self.children:
            return
        self.consuming.stop(error.what, self._tell, self._now())
        with suppress(ConsumerDiedError, FinewebError):  # the first error is the one to report
            self._until_done()

    # ── processes ───────────────────────────────────────────────────────────────────────────

    def _start(self, name: str, role: str) -> None:
        now = self._now()
        try:
            child = spawn.start(name, role, **self._descriptors, now=now)
        except OSError as error:  # no process or descriptor is left: like a death at once
            self._died(name, f"an error at its start: {error}")
            return
        self.children[name] = child
        first = {
            "fetcher": self.setup.fetcher,
            "decompressor": self.setup.decompressor,
            "tokenizer": self.setup.tokenizer,
        }.get(role, self.setup.consumer)
        self._selector.register(child.channel, selectors.EVENT_READ, child)
        assert child.process.stderr is not None
        self._selector.register(child.process.stderr, selectors.EVENT_READ, child)
        child.channel.send(first)
        self.hooks.event("debug", "worker_started", who=name, pid=child.pid)

    def _forget(self, child: spawn.Child) -> None:
        self._read_stderr(child)
        self._selector.unregister(child.channel)
        if child.process.stderr is not None and child.process.stderr in self._selector.get_map():
            self._selector.unregister(child.process.stderr)
        child.close()
        self.hooks.reaped(child.role, child.cpu_s)
        del self.children[child.name]

    def _end(self) -> None:
        """Kill what still runs: workers hold nothing that could be lost."""
        for child in list(self.children.values()):
            child.kill()
            self._forget(child)
        self._selector.close()

    # ── the event loop ──────────────────────────────────────────────────────────────────────

    def _wait(self) -> None:
        """One round: wait for something to happen, and handle all of it."""
        timeout = TICK_S
        if self._spawns:
            timeout = min(timeout, max(0.0, self._spawns[0][0] - self._now()))
        for key, mask in self._selector.select(timeout):
            child = key.data
            if child is None or child.name not in self.children:
                continue
            if key.fileobj is child.process.stderr:
                self._read_stderr(child)
                continue
            if mask & selectors.EVENT_WRITE:
                child.channel.flush()
            if mask & selectors.EVENT_READ:
                self._receive(child)
            if self.consuming.done is not None:
                return
        now = self._now()
        while self._spawns and self._spawns[0][0] <= now:
            command = heapq.heappop(self._spawns)[2]
            self._start(command.worker, command.role)
        if now - self._ticked >= TICK_S:
            self._ticked = now
            self._tick(now)
        for child in self.children.values():
            events = selectors.EVENT_READ
            if child.channel.wants_write:
                events |= selectors.EVENT_WRITE
            if self._selector.get_key(child.channel).events != events:
                self._selector.modify(child.channel, events, child)

    def _tick(self, now: float) -> None:
        """A quarter of a second has passed: what hangs, what is too large, what is due."""
        if not self._failed:
            self._carry_out(self.scheduler.on_time(now))
        if CONSUMER in self.children:
            self.consuming.on_time(self._tell, now)
            if not self.consuming.has_work():
                self.children[CONSUMER].heard = now
        for child in list(self.children.values()):
            judged = child.name == CONSUMER  # for the others: Scheduler.on_time
            reason = self._watch.silent(child, now) if judged else None
            if reason := reason or self._watch.too_large(child):
                self._kill(child, reason)
        self.hooks.tick()

    def _kill(self, child: spawn.Child, reason: str) -> None:
        self.hooks.event("warning", "worker_killed", who=child.name, reason=reason)
        child.kill(reason)  # its socket's EOF reports the death

    def _receive(self, child: spawn.Child) -> None:
        messages, gone = child.channel.receive()
        if messages:
            child.heard = self._now()
        for message in messages:
            self._handle(child, message)
            if self.consuming.done is not None:
                return
        if gone:
            how = child.wait()
            self._forget(child)
            self._died(child.name, how)

    def _died(self, name: str, how: str) -> None:
        if name == CONSUMER:
            raise ConsumerDiedError(how)
        if not self._failed:
            self._carry_out(self.scheduler.on_death(name, how, self._now()))

    def _read_stderr(self, child: spawn.Child) -> None:
        """What a worker writes to standard error is a log event, a line each."""
        assert child.process.stderr is not None
        data = child.process.stderr.read(_STDERR_BYTES)
        for line in (data or b"").decode(errors="replace").splitlines():
            if line.strip():
                self.hooks.event("warning", "worker_stderr", who=child.name, line=line[:2000])
        if data == b"" and child.process.stderr in self._selector.get_map():
            self._selector.unregister(child.process.stderr)

    def _heed_stop(self) -> None:
        wanted = self.hooks.stop_requested()
        now = self._now()
        if wanted and self.consuming.stopping_since is None:
            self.consuming.stop("asked to stop", self._tell, now)
            self.hooks.event("info", "stopping", hint="again to stop without a checkpoint")
        since = self.consuming.stopping_since
        if wanted > 1 or (since is not None and now - since > _STOP_WAIT_S):
            raise StoppedError(
                "stopped without a checkpoint", "the same command resumes from the last one"
            )

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def _tell(self, message: Message) -> None:
        """Send the consumer a message, unless its death has yet to be handled."""
        if CONSUMER in self.children:
            self.children[CONSUMER].channel.send(message)

    def _schedule(self, name: str, message: Message) -> None:
        if not self._failed:
            self._carry_out(self.scheduler.on_message(name, message, self._now()))

    def _handle(self, child: spawn.Child, message: Message) -> None:
        point = type(message).__name__
        faultpoint(f"received:{point}")
        self.hooks.heard(point)
        match message:
            case Log(level=level, event=event, fields=fields):
                self.hooks.event(level, event, who=child.name, **fields)
            case Failed():
                if message.traceback:
                    self.hooks.event(
                        "error", "worker_failed", who=child.name, traceback=message.traceback
                    )
                code = ExitCode(message.exit_code)
                kind = StoppedError if code is ExitCode.RESUME else FinewebError
                error = kind(message.what, message.remedy)
                error.exit_code = code
                raise error
            case _:
                child.ready = child.ready or isinstance(message, Hello)
                self._dispatch(child, message)
        faultpoint(f"handled:{point}")

    def _dispatch(self, child: spawn.Child, message: Message) -> None:
        """To the consumer's desk or to the scheduler."""
        if child.name != CONSUMER:
            self._schedule(child.name, message)
            return
        commands = self.consuming.take(message, self._tell, self._now())
        if commands is None:
            self._schedule(CONSUMER, message)
        elif not self._failed:
            self._carry_out(commands)

    # ── commands ────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(worker=worker, message=message):
                    if worker in self.children:  # else: its death has yet to be handled
                        self.children[worker].channel.send(message)
                case Spawn(delay_s=delay):
                    due = self._now() + delay
                    heapq.heappush(self._spawns, (due, next(self._order), command))
                case Kill(worker=worker, reason=reason):
                    if worker in self.children:  # else: its death has yet to be handled
                        self._kill(self.children[worker], reason)
                case Evict(shard=shard):
                    faultpoint("supervisor:before_evict")
                    self.hooks.evict(shard)
                    faultpoint("supervisor:after_evict")
                case Note(level=level, event=event, fields=fields):
                    self.hooks.event(level, event, **fields)


def evict_files(cache_dir: Path, key: str) -> None:
    """Delete the partial and whole files of a shard."""
    for path in (*cache_dir.glob(f"{key}.*.shard"), cache_dir / f"{key}.partial"):
        path.unlink(missing_ok=True)
