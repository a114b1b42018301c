"""One generation: the processes, segments and event loop from a cursor to an end.

Runs in: supervisor. First start, resume, and restart after the trainer's death are all this.
"""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import spawn
from pipeline.errors import BudgetError, ExitCode, FinewebError, StoppedError
from pipeline.messages import (
    CheckpointGranted,
    CheckpointWanted,
    CheckpointWritten,
    ConsumerDone,
    ConsumerReady,
    Cursor,
    CursorIs,
    CursorWanted,
    DecompressorSetup,
    Failed,
    FetcherSetup,
    Hello,
    Log,
    Message,
    StepDone,
    Stop,
    TextLayout,
    TokenizerSetup,
)
from pipeline.scheduler import CONSUMER, Scheduler
from pipeline.state import Command, Evict, Kill, Note, Plan, Send, Spawn

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


@dataclass
class Generation:
    """Runs workers and consumer until the consumer has finished.

    Args:
        plan: Of the scheduler.
        setup: First messages.
        hooks: Callbacks.
        text_fd: Descriptor of the text segment.
        ring_fd: Descriptor of the ring segment.
        checkpoint_bytes: Bytes set aside for checkpoints, if that is known already.
    """

    plan: Plan
    setup: Setup
    hooks: Hooks
    text_fd: int
    ring_fd: int
    checkpoint_bytes: int | None
    checkpoints_kept: int
    children: dict[str, spawn.Child] = field(default_factory=dict)
    writing_bytes: int = 0  # of the checkpoint that is being written
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.plan, self.checkpoint_bytes)
        self._selector = selectors.DefaultSelector()
        self._spawns: list[tuple[float, int, Spawn]] = []
        self._order = itertools.count()
        self._done: ConsumerDone | None = None
        self._stopping_since: float | None = None
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
                if self.facts and not isinstance(error, StoppedError):
                    self._save_before(error)
                raise

    def _until_done(self) -> ConsumerDone:
        while self._done is None:
            self._wait()
            self._heed_stop()
        return self._done

    def _save_before(self, error: FinewebError) -> None:
        """The stream cannot go on: let the consumer save what it has consumed, then end."""
        self.hooks.event("error", "stream_ended", what=error.what)
        self._failed = True
        if CONSUMER not in self.children:
            return
        self.children[CONSUMER].channel.send(Stop(error.what))
        self._stopping_since = time.monotonic()
        with suppress(ConsumerDiedError, FinewebError):  # the first error is the one to report
            self._until_done()

    # ── processes ───────────────────────────────────────────────────────────────────────────

    def _start(self, name: str, role: str) -> None:
        child = spawn.start(name, role, text_fd=self.text_fd, ring_fd=self.ring_fd)
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
        if child.process.stderr in self._selector.get_map():
            self._selector.unregister(child.process.stderr)
        child.close()
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
        now = time.monotonic()
        timeout = TICK_S
        if self._spawns:
            timeout = min(timeout, max(0.0, self._spawns[0][0] - now))
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
            if self._done is not None:
                return
        now = time.monotonic()
        while self._spawns and self._spawns[0][0] <= now:
            command = heapq.heappop(self._spawns)[2]
            self._start(command.worker, command.role)
        if now - self._ticked >= TICK_S:
            self._ticked = now
            if not self._failed:
                self._carry_out(self.scheduler.on_time(now))
            self.hooks.tick()
        for child in self.children.values():
            events = selectors.EVENT_READ
            if child.channel.wants_write:
                events |= selectors.EVENT_WRITE
            if self._selector.get_key(child.channel).events != events:
                self._selector.modify(child.channel, events, child)

    def _receive(self, child: spawn.Child) -> None:
        messages, gone = child.channel.receive()
        for message in messages:
            self._handle(child, message)
            if self._done is not None:
                return
        if gone:
            how = child.wait()
            self._forget(child)
            if child.name == CONSUMER:
                raise ConsumerDiedError(how)
            if not self._failed:
                self._carry_out(self.scheduler.on_death(child.name, how, time.monotonic()))

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
        now = time.monotonic()
        if wanted and self._stopping_since is None:
            self._stopping_since = now
            self.children[CONSUMER].channel.send(Stop("asked to stop"))
            self.hooks.event("info", "stopping", hint="again to stop without a checkpoint")
        late = self._stopping_since is not None and now - self._stopping_since > _STOP_WAIT_S
        if wanted > 1 or late:
            raise StoppedError(
                "stopped without a checkpoint", "the same command resumes from the last one"
            )

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def _schedule(self, name: str, message: Message) -> None:
        if not self._failed:
            self._carry_out(self.scheduler.on_message(name, message, time.monotonic()))

    def _handle(self, child: spawn.Child, message: Message) -> None:
        match message:
            case Log(level=level, event=event, fields=fields):
                self.hooks.event(level, event, who=child.name, **fields)
            case Failed():
                if message.traceback:
                    self.hooks.event(
                        "error", "worker_failed", who=child.name, traceback=message.traceback
                    )
                error = FinewebError(message.what, message.remedy)
                error.exit_code = ExitCode(message.exit_code)
                raise error
            case _ if child.name == CONSUMER:
                self._handle_consumer(child, message)
            case _:
                self._schedule(child.name, message)

    def _handle_consumer(self, child: spawn.Child, message: Message) -> None:
        match message:
            case Hello():
                pass
            case ConsumerReady(checkpoint_bytes=size, facts=facts):
                self.facts = facts
                self.hooks.event("info", "consumer_ready", **facts)
                total = size * (self.checkpoints_kept + 1)
                self._carry_out(self.scheduler.on_checkpoint_bytes(total))
            case CursorWanted(request=request, positions=positions):
                cursor = self.scheduler.cursor(positions, self.setup.base)
                child.channel.send(CursorIs(request, cursor, self.scheduler.shards_at(cursor)))
            case CheckpointWanted(request=request, size_bytes=size):
                self._grant_checkpoint(child, request, size)
            case CheckpointWritten():
                self.writing_bytes = 0
                self.hooks.checkpoint(message)
            case StepDone(metrics=metrics):
                self.hooks.step(metrics)
            case ConsumerDone():
                self._done = message
            case _:
                self._schedule(CONSUMER, message)

    def _grant_checkpoint(self, child: spawn.Child, request: int, size_bytes: int) -> None:
        reserved = self.scheduler.state.checkpoint_bytes or 0
        if size_bytes * (self.checkpoints_kept + 1) > reserved:
            raise BudgetError(
                f"a checkpoint of {size_bytes} bytes is larger than what was set aside "
                f"({reserved} bytes for {self.checkpoints_kept + 1})",
                "this is a bug: please report it",
            )
        self.writing_bytes = size_bytes
        child.channel.send(CheckpointGranted(request))

    # ── commands ────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(worker=worker, message=message):
                    if worker in self.children:  # else: its death has yet to be handled
                        self.children[worker].channel.send(message)
                case Spawn(delay_s=delay):
                    due = time.monotonic() + delay
                    heapq.heappush(self._spawns, (due, next(self._order), command))
                case Kill(worker=worker, reason=reason):
                    self.hooks.event("warning", "worker_killed", who=worker, reason=reason)
                    self.children[worker].kill()  # its socket's EOF reports the death
                case Evict(shard=shard):
                    self.hooks.evict(shard)
                case Note(level=level, event=event, fields=fields):
                    self.hooks.event(level, event, **fields)


def evict_files(cache_dir: Path, key: str) -> None:
    """Delete the partial and whole files of a shard."""
    for path in (*cache_dir.glob(f"{key}.*.shard"), cache_dir / f"{key}.partial"):
        path.unlink(missing_ok=True)
