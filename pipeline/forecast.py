"""What a run will do, before it does it: a discrete-event simulation of the real scheduler.

Runs in: the command line's own process, for `plan`. Pure: no clock, no file, no process.

The scheduler decides as in a run; the workers are models that take the time that was measured.
Processors are shared fairly: while those who read, encode and train want more of them than there
are, all are slowed down alike. So is the network. The supervisor takes its time as well, message
by message, one after the other; it and the writer sleep in between, and so they run at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from pipeline.messages import (
    BlockFilled,
    BlockStart,
    Encode,
    Encoded,
    Entry,
    Fetch,
    FillBlock,
    Grant,
    Hello,
    LaneEnded,
    Message,
    OpenShard,
    Place,
    Placed,
    ReserveMore,
    ShardEnded,
    ShardFetched,
    SlotPublished,
)
from pipeline.reading import NOT_YET, Reading
from pipeline.scheduler import CONSUMER, Scheduler
from pipeline.state import Command, Evict, Kill, Note, Plan, Send, Spawn
from pipeline.turns import Turns, one_group

ROLES = {"fetch": "fetcher", "decompress": "decompressor", "tokenize": "tokenizer"}
_LOOK_S = 0.25  # simulated seconds between looks at what limits
_MOST_EVENTS = 30_000  # then the rest of the run is taken to go on as its second half did
_ENDLESS = 1 << 62  # tokens of a writer without a limit
_MESSAGES_PER_BLOCK = 3  # filled, encoded, placed
_LEAST_SHARE = 0.1  # of the processors, that is left to those who work without a pause
_PIECES = 16  # that the writer takes at once
_COPY_BYTES_PER_S = 4e9  # of tokens into the ring
_START_LOG_BYTES, _EVENT_LOG_BYTES, _UPDATE_LOG_BYTES = 6_000, 200, 1_500


class Rates(msgspec.Struct, frozen=True):
    """What a machine does; megabytes are 10⁶ bytes of text unless the name says otherwise."""

    cpus: int
    read_s: float  # CPU seconds a megabyte
    encode_s: float
    write_s: float
    supervise_s: float
    fetch_s: float
    tokens_per_mb: float
    text_per_shard_byte: float
    network_bytes_per_s: float = 1e9  # of all fetchers together


class Training(msgspec.Struct, frozen=True):
    """What the trainer does; without one a writer reads the ring."""

    micro_s: float  # of one micro-step, alone on the machine
    apply_s: float  # of the optimizer
    cores: float  # that it keeps busy meanwhile; 0: it computes elsewhere, on a GPU
    batch_windows: int
    accumulation: int  # micro-steps of an update
    updates: int
    checkpoint_bytes: int = 0  # that are reserved for one
    saved_bytes: int = 0  # that one takes once it is written
    checkpoint_every: int = 1 << 60  # updates
    kept: int = 1  # checkpoints beside the one being written
    save_s: float = 0.1  # until one is durable


class Forecast(msgspec.Struct, frozen=True):
    """What will be."""

    tokens: int
    wall_s: float  # without the start
    tokens_per_s: float
    wait_share: float | None  # of the trainer's time, on data
    peak_disk_bytes: int
    fetched_bytes: int
    fetched_shards: int
    busy: dict[str, float]  # stage → share of its workers' time
    limiting: dict[str, float]  # stage or consumer → how often it is what is waited for
    idle_cores: float
    simulated_s: float  # of wall_s; the rest is taken to go on like that
    whole: bool  # all of the run was simulated


class _Resource:
    """Something that is shared fairly, in virtual time: that of a user who is never slowed down."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.demand, self.virtual, self.used = capacity, 0.0, 0.0, 0.0
        self.first = 0.0  # demand of those who are never slowed down
        self.heap: list[tuple[float, int, float, Callable[[], None]]] = []

    @property
    def rate(self) -> float:
        left = max(_LEAST_SHARE * self.capacity, self.capacity - self.first)
        return min(1.0, left / self.demand) if self.demand > 0 else 1.0

    def due_s(self) -> float | None:
        """Seconds until the next user is done."""
        if not self.heap:
            return None
        return max(0.0, self.heap[0][0] - self.virtual) / self.rate

    def pass_by(self, seconds: float) -> None:
        self.used += seconds * min(self.demand + self.first, self.capacity)
        self.virtual += seconds * self.rate


class _Worker:
    """A process: one thing at a time, in the order in which it was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inbox: deque[Message] = deque()
        self.working = False
        self.life = 0  # what was begun before its death is not finished after it


class Simulation:
    """One generation from the beginning of a run.

    Args:
        plan: The scheduler's.
        rates: Of the machine.
        training: Of the trainer; None: a writer.
        block_bytes: Text of a block.
        assumed_bytes: Of a shard whose size is not known.
        limit_tokens: A writer stops there.
        other_bytes: On the disk from the beginning: the catalog, held-out tokens.
    """

    def __init__(
        self,
        plan: Plan,
        rates: Rates,
        training: Training | None,
        *,
        block_bytes: int,
        assumed_bytes: int = 100_000_000,
        limit_tokens: int | None = None,
        other_bytes: int = 0,
    ) -> None:
        self.plan, self.rates, self.training = plan, rates, training
        known = training.checkpoint_bytes * (training.kept + 1) if training else 0
        self.scheduler = Scheduler(plan, None if training else 0)
        self._checkpoints_bytes = known
        self.cpu, self.network = _Resource(rates.cpus), _Resource(1.0)
        self.now, self.events = 0.0, 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count().__next__
        self._workers: dict[str, _Worker] = {}
        self._letters: deque[Callable[[], list[Command]]] = deque()  # the supervisor's mail
        self._supervising = False
        lanes = plan.lanes.lanes
        T, C = plan.seq_len, plan.ring.slot_tokens
        chunk = C if training is None and lanes == 1 else T
        turns = Turns(plan.groups or one_group(lanes), T)
        self.reading = Reading(
            [0] * lanes, chunk, C, writer=training is None,
            due=lambda positions: turns.next_group(positions).members,
        )  # fmt: skip
        self.consumer = _Trainer(self, training) if training else _Writer(self, limit_tokens)
        self._sizes = [one.size_bytes or assumed_bytes for one in plan.shards]
        self._block_bytes = block_bytes
        self._by_name = {one.name: index for index, one in enumerate(plan.shards)}
        mean = rates.text_per_shard_byte * sum(self._sizes) / len(self._sizes)
        messages = _MESSAGES_PER_BLOCK * 1e6 / min(block_bytes, mean) + rates.tokens_per_mb / C
        self._message_s = rates.supervise_s / messages
        self._streams: dict[int, list[int]] = {}  # stream → text left, its next block
        self._slot_text: dict[int, int] = {}
        self._fetching: dict[str, list[int]] = {}  # fetcher → shard, bytes so far, limit
        self.other_bytes = other_bytes + _START_LOG_BYTES
        self.peak_disk_bytes = self.peak_files_bytes = 0
        self.saved_bytes = self.saving_bytes = 0
        self.limiting: Counter[str] = Counter()
        self.done = False

    # ── time ────────────────────────────────────────────────────────────────────────────────

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """In so many seconds, whoever is busy."""
        heapq.heappush(self._timers, (self.now + seconds, self._order(), then))

    def use(
        self, resource: _Resource, seconds: float, then: Callable[[], None], demand: float = 1.0
    ) -> None:
        """When so many seconds of undisturbed use are over."""
        resource.demand += demand
        due = resource.virtual + seconds
        heapq.heappush(resource.heap, (due, self._order(), demand, then))

    def use_first(self, seconds: float, then: Callable[[], None]) -> None:
        """The same for a process that sleeps most of its time: the system lets it run at once."""
        self.cpu.first += 1

        def over() -> None:
            self.cpu.first -= 1
            then()

        self.after(seconds, over)

    def _next(self) -> bool:
        """Let the next thing happen; False if nothing ever will."""
        due = [(r.due_s(), r) for r in (self.cpu, self.network)]
        waits = [(s, r) for s, r in due if s is not None]
        timer_s = max(0.0, self._timers[0][0] - self.now) if self._timers else None
        soonest = min((s for s, _ in waits), default=None)
        if soonest is None and timer_s is None:
            return False
        first = timer_s is not None and (soonest is None or timer_s <= soonest)
        step_s = timer_s if first else soonest
        assert step_s is not None
        self.now += step_s
        self.cpu.pass_by(step_s)
        self.network.pass_by(step_s)
        if first:
            heapq.heappop(self._timers)[2]()
        else:
            resource = min(waits, key=lambda one: one[0])[1]
            _, _, demand, then = heapq.heappop(resource.heap)
            resource.demand = resource.demand - demand if resource.heap else 0.0
            then()
        self.events += 1
        return True

    # ── the run ─────────────────────────────────────────────────────────────────────────────

    def run(self) -> Forecast:
        """To the end, or as far as it goes in so many events.

        Raises:
            FinewebError: what the run itself would end with: a budget that is too small.
        """
        self._carry_out(self.scheduler.start({}, {}))
        if self.training is not None:
            self._carry_out(self.scheduler.on_checkpoint_bytes(self._checkpoints_bytes))
        self.consumer.look()
        self._look()
        marks: list[tuple[float, int]] = [(0.0, 0)]
        while not self.done and self.events < _MOST_EVENTS and self._next():
            if self.consumer.tokens != marks[-1][1]:
                marks.append((self.now, self.consumer.tokens))
        return self._result(marks)

    def _look(self) -> None:
        self.limiting[self.scheduler.limiting()] += 1
        if not self.done:
            self.after(_LOOK_S, self._look)

    def _result(self, marks: list[tuple[float, int]]) -> Forecast:
        tokens, now = self.consumer.tokens, self.now
        half = next((one for one in marks if one[1] >= tokens / 2), marks[0])
        rate = (tokens - half[1]) / (now - half[0]) if now > half[0] else 0.0
        total = tokens if self.done else self._total_tokens()
        wall_s = now + ((total - tokens) / rate if rate and not self.done else 0.0)
        state, seen = self.scheduler.state, max(1, sum(self.limiting.values()))
        per_s = total / wall_s if wall_s else 0.0
        shard_bytes = (total - tokens) / self._tokens_per_byte()  # that are still to come
        mean_bytes = sum(self._sizes) / len(self._sizes)
        remote = state.fetched_shards > 0
        return Forecast(
            tokens=total,
            wall_s=wall_s,
            tokens_per_s=per_s,
            wait_share=self.consumer.wait_s / now if self.training and now else None,
            peak_disk_bytes=self.peak_disk_bytes if self.done else self._peak_to_come(),
            fetched_bytes=state.fetched_bytes + int(shard_bytes * remote),
            fetched_shards=state.fetched_shards + int(shard_bytes / mean_bytes * remote),
            busy={name: self._busy(role) for name, role in ROLES.items()},
            limiting={name: count / seen for name, count in self.limiting.items()},
            idle_cores=self.rates.cpus - self.cpu.used / now if now else float(self.rates.cpus),
            simulated_s=now,
            whole=self.done,
        )

    def _tokens_per_byte(self) -> float:
        """Of a shard."""
        return self.rates.tokens_per_mb * self.rates.text_per_shard_byte / 1e6

    def _peak_to_come(self) -> int:
        """Of a run of which only the beginning was simulated: the checkpoints come on top."""
        one = self.training
        if one is None:
            return self.peak_disk_bytes
        saves = one.updates // one.checkpoint_every + bool(one.updates % one.checkpoint_every)
        saved = min(saves - 1, one.kept) * one.saved_bytes + one.checkpoint_bytes
        logs = self._log_bytes(one.updates) - self._log_bytes(self.consumer.updates)
        peak = self.peak_files_bytes + saved + logs
        return min(max(peak, self.peak_disk_bytes), self.plan.budget_bytes)

    def _total_tokens(self) -> int:
        """Of the whole run, as it is meant to be."""
        lanes, text = self.plan.lanes, 0.0
        wanted = self.consumer.wanted_tokens
        if lanes.endless:
            return self.consumer.tokens if wanted == _ENDLESS else wanted
        for lane in range(lanes.lanes):
            turns = (lanes.turn(lane, n) for n in itertools.count())
            for turn in iter(turns.__next__, None):
                text += self._sizes[turn.shard] * self.rates.text_per_shard_byte
        most = int(text * self.rates.tokens_per_mb / 1e6)
        return min(most, wanted)

    def _busy(self, role: str) -> float:
        workers = [one for one in self.scheduler.state.workers.values() if one.role == role]
        busy_s = sum(
            one.busy_s + (self.now - one.busy_since if one.busy_since is not None else 0.0)
            for one in workers
        )
        return busy_s / (len(workers) * self.now) if workers and self.now else 0.0

    def _log_bytes(self, updates: int) -> int:
        """Of logs and small files after so many updates; they have a limit of their own."""
        state = self.scheduler.state
        events = _EVENT_LOG_BYTES * (state.fetched_shards + state.evicted_shards)
        size = self.other_bytes + events + _UPDATE_LOG_BYTES * updates
        return min(size, max(self.plan.fixed_bytes, self.other_bytes))

    def disk(self) -> None:
        """Note the peak, counted as a run counts it (Reporter.disk)."""
        logs = self._log_bytes(self.consumer.updates)
        used = self.scheduler.fetching.reserved_bytes() + logs + self.saved_bytes
        self.peak_disk_bytes = max(self.peak_disk_bytes, used + self.saving_bytes)
        self.peak_files_bytes = max(self.peak_files_bytes, used - self.saved_bytes)

    # ── the supervisor ──────────────────────────────────────────────────────────────────────

    def tell(self, name: str, message: Message) -> None:
        """A message for the supervisor, who takes one at a time."""
        self._post(lambda: self.scheduler.on_message(name, message, self.now))

    def _post(self, letter: Callable[[], list[Command]]) -> None:
        self._letters.append(letter)
        if not self._supervising:
            self._supervise()

    def _supervise(self) -> None:
        self._supervising = bool(self._letters)
        if self._supervising:
            self.use_first(self._message_s, self._decide)

    def _decide(self) -> None:
        self._carry_out(self._letters.popleft()())
        self._supervise()

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(worker=name, message=message):
                    if name == CONSUMER:
                        assert isinstance(message, SlotPublished | LaneEnded)
                        self.reading.take(message)
                        self.consumer.look()
                    elif name in self._workers:
                        self._workers[name].inbox.append(message)
                        self._work(self._workers[name])
                case Spawn(worker=name, role=role, delay_s=delay):
                    self.after(delay, partial(self._born, name, role))
                case Kill(worker=name):
                    worker = self._workers.pop(name, None)
                    if worker is not None:
                        worker.life += 1
                        self._post(partial(self._died, name))
                case Evict() | Note():
                    pass
        self.disk()

    # ── the workers ─────────────────────────────────────────────────────────────────────────

    def _born(self, name: str, role: str) -> None:
        self._workers[name] = _Worker(name)
        self.tell(name, Hello(role, 0))

    def _died(self, name: str) -> list[Command]:
        return self.scheduler.on_death(name, "plan", self.now)

    def _work(self, worker: _Worker) -> None:
        """Begin what comes next, unless it is at work; what can be placed goes first."""
        while worker.inbox and not worker.working:
            message = next((one for one in worker.inbox if isinstance(one, Place)), worker.inbox[0])
            worker.inbox.remove(message)
            self._begin(worker, message)

    def _for(
        self, worker: _Worker, seconds: float, answer: Callable[[], Message], resource: Any = None
    ) -> None:
        """Work so long, then answer."""
        life, worker.working = worker.life, True

        def over() -> None:
            if worker.life == life:
                worker.working = False
                self.tell(worker.name, answer())
                self._work(worker)

        self.use(resource or self.cpu, seconds, over)

    def _begin(self, worker: _Worker, message: Message) -> None:
        rates = self.rates
        match message:
            case Fetch(shard=shard, limit_bytes=limit):
                self._fetching[worker.name] = [shard, 0, limit]
                self._fetch(worker)
            case Grant(limit_bytes=limit):
                self._fetching[worker.name][2] = limit
                self._fetch(worker)
            case OpenShard(stream=stream, name=name, skip_blocks=skip):
                text = int(self._sizes[self._by_name[name]] * rates.text_per_shard_byte)
                self._streams[stream] = [max(0, text - skip * self._block_bytes), skip]
            case FillBlock(stream=stream):
                left = self._streams[stream][0]
                size = min(left, self._block_bytes)
                self._for(worker, rates.read_s * size / 1e6, lambda: self._filled(message, size))
            case Encode(block=block, slot=slot):
                size = self._slot_text[slot]
                count = round(size * rates.tokens_per_mb / 1e6)
                encoded = Encoded(block, count, 0, 0.0)
                self._for(worker, rates.encode_s * size / 1e6, lambda: encoded)
            case Place(block=block, first=first, count=count):
                copy_s = count * self.plan.ring.token_bytes / _COPY_BYTES_PER_S
                self._for(worker, copy_s, lambda: Placed(block, first, count))

    def _fetch(self, worker: _Worker) -> None:
        """Fetch up to the limit: the network first, then what it costs the processor."""
        shard, have, limit = self._fetching[worker.name]
        goal = min(self._sizes[shard], limit)
        seconds = (goal - have) / self.rates.network_bytes_per_s
        cpu_s = (goal - have) / 1e6 * self.rates.fetch_s
        life, worker.working = worker.life, True
        self._fetching[worker.name][1] = goal
        size = self._sizes[shard]
        done = ShardFetched(shard, "", size) if goal == size else ReserveMore(shard, goal)

        def arrived() -> None:
            if worker.life == life:
                self._for(worker, cpu_s, lambda: done)

        self.use(self.network, seconds, arrived)

    def _filled(self, message: FillBlock, size: int) -> Message:
        left = self._streams[message.stream]
        if size == 0:
            del self._streams[message.stream]
            return ShardEnded(message.stream, message.slot, left[1], 0, (), 0)
        left[0] -= size
        left[1] += 1
        self._slot_text[message.slot] = size
        return BlockFilled(
            stream=message.stream,
            block=left[1] - 1,
            slot=message.slot,
            documents=1,
            text_bytes=size,
            num_bad=0,
            bad=(),
            filtered=0,
            next=BlockStart(Entry(left[1]), 0),
        )


class _Trainer:
    """Takes windows, computes, saves now and then."""

    def __init__(self, sim: Simulation, training: Training) -> None:
        self.sim, self.training = sim, training
        self.tokens = self.updates = 0
        self.wait_s = 0.0
        self._windows = self._micro = 0
        self._computing = False
        self._since: float | None = 0.0
        self._saved: deque[int] = deque()
        self.wanted_tokens = (
            training.updates * training.accumulation * training.batch_windows * sim.plan.seq_len
        )

    def look(self) -> None:
        """Take what is there; compute once a batch is whole."""
        sim = self.sim
        while not self._computing and not sim.done:
            lane = sim.reading.next_lane()
            if lane is None:
                sim.done = True
            elif lane == NOT_YET:
                self._since = sim.now if self._since is None else self._since
                return
            else:
                self._took(lane)

    def _took(self, lane: int) -> None:
        sim, one = self.sim, self.training
        if self._since is not None:
            self.wait_s += sim.now - self._since if self.tokens else 0.0
            self._since = None
        read = sim.reading.read(lane)
        if read.frees is not None:
            sim.tell(CONSUMER, read.frees)
        self._windows += 1
        if self._windows == one.batch_windows:
            self._windows, self._computing = 0, True
            self._compute(one.micro_s, self._micro_done)

    def _compute(self, seconds: float, then: Callable[[], None]) -> None:
        if self.training.cores:
            self.sim.use(self.sim.cpu, seconds, then, self.training.cores)
        else:
            self.sim.after(seconds, then)

    def _micro_done(self) -> None:
        one = self.training
        self.tokens += one.batch_windows * self.sim.plan.seq_len
        self._micro += 1
        if self._micro == one.accumulation:
            self._micro = 0
            self._compute(one.apply_s, self._applied)
        else:
            self._computing = False
            self.look()

    def _applied(self) -> None:
        sim, one = self.sim, self.training
        self.updates += 1
        self._computing = False
        last = self.updates >= one.updates
        if last or self.updates % one.checkpoint_every == 0:
            sim.saving_bytes = one.checkpoint_bytes
            sim.disk()
            sim.after(one.save_s, self._durable)
        if last:
            sim.after(one.save_s, self._end)
        else:
            self.look()

    def _durable(self) -> None:
        sim = self.sim
        self._saved.append(self.training.saved_bytes)
        while len(self._saved) > self.training.kept:
            self._saved.popleft()
        sim.saving_bytes, sim.saved_bytes = 0, sum(self._saved)
        sim.disk()

    def _end(self) -> None:
        self.sim.done = True


class _Writer:
    """Writes every token."""

    def __init__(self, sim: Simulation, limit_tokens: int | None) -> None:
        self.sim = sim
        self.tokens = self.updates = 0
        self.wait_s = 0.0
        self._writing = False
        self.wanted_tokens = _ENDLESS if limit_tokens is None else limit_tokens

    def look(self) -> None:
        """Write what is there, some pieces at a time."""
        sim = self.sim
        if self._writing or sim.done:
            return
        count, freed, lane = 0, [], sim.reading.next_lane()
        ended = lane is None or self.tokens >= self.wanted_tokens
        for _ in range(_PIECES):
            if lane is None or lane == NOT_YET:
                break
            read = sim.reading.read(lane)
            count += read.end - read.begin
            freed += [read.frees] if read.frees is not None else []
            lane = sim.reading.next_lane()
        if ended:
            sim.done = True
        elif count:
            self._writing = True
            self.tokens = min(self.wanted_tokens, self.tokens + count)

            def written() -> None:
                self._writing = False
                for message in freed:
                    sim.tell(CONSUMER, message)
                self.look()

            sim.use_first(sim.rates.write_s * count / sim.rates.tokens_per_mb, written)
