"""Which shard is fetched next, into how many bytes, and when its file is deleted.

Runs in: supervisor. Pure: the first of the scheduler's three stages.
"""

from __future__ import annotations

from pipeline import budget
from pipeline.errors import BudgetError, ShardError, SourceError
from pipeline.messages import (
    Fetch,
    FetchFailed,
    FetchProgress,
    Grant,
    ReserveMore,
    ShardFetched,
    Skip,
)
from pipeline.state import Evict, File, FileState, Kill, Lane, Run, Send, State, Worker

_MAX_DAMAGED = 3  # a cached file found damaged this often is not a passing fault


class Fetching:
    """Files and bytes: attaches runs to files, hands out fetches, evicts."""

    def __init__(self, state: State) -> None:
        self.state = state
        plan = state.plan
        remote = [shard.size_bytes for shard in plan.shards if shard.local_path is None]
        self.floor = budget.floor_bytes(remote, plan.grant_step_bytes) if remote else 0
        for shard, file in zip(plan.shards, state.files, strict=True):
            if shard.local_path is not None:
                file.state, file.path = FileState.CACHED, shard.local_path

    # ── the budget ──────────────────────────────────────────────────────────────────────────

    def _local(self, file: File) -> bool:
        return self.state.plan.shards[file.shard].local_path is not None

    def charge_bytes(self) -> int:
        """Bytes taken from the budget now."""
        state = self.state
        currents = self._currents()
        current: list[int] = []
        ahead: list[int] = []
        for file in state.files_in_use():
            alone = file.users and file.users <= currents
            (current if alone else ahead).append(file.reserved_bytes)
        return budget.charge(
            state.plan.fixed_bytes + (state.checkpoint_bytes or 0),
            self.floor,
            sum(1 for lane in state.lanes if lane.runs or not lane.finished),
            current,
            ahead,
        )

    def _fits(self, file: File, reserved_bytes: int) -> bool:
        """Whether the budget holds with this file's reservation changed; if so, changes it.

        What checkpoints need comes before anything beyond the floor.
        """
        if self.state.checkpoint_bytes is None and reserved_bytes > self.floor:
            return False
        before = file.reserved_bytes
        file.reserved_bytes = reserved_bytes
        if self.charge_bytes() <= self.state.plan.budget_bytes:
            return True
        file.reserved_bytes = before
        return False

    def reserved_bytes(self) -> int:
        """Bytes that files in the cache have or may come to have."""
        return sum(file.reserved_bytes for file in self.state.files_in_use())

    def check_budget(self, checkpoint_bytes: int) -> None:
        """Refuse a budget that is too small, as soon as all its parts are known."""
        state = self.state
        budget.refuse_too_small(
            state.plan.budget_bytes,
            fixed_bytes=state.plan.fixed_bytes,
            checkpoint_bytes=checkpoint_bytes,
            floor=self.floor,
            lanes=len(state.lanes),
        )

    def confirm(self, checkpoint_bytes: int) -> None:
        """The consumer has said what its checkpoints need: shards ahead make room for them.

        Raises:
            BudgetError: the budget is too small for them.
        """
        state = self.state
        self.check_budget(checkpoint_bytes)
        known = state.checkpoint_bytes
        state.checkpoint_bytes, state.confirmed = checkpoint_bytes, True
        while (charge := self.charge_bytes()) > state.plan.budget_bytes:
            if not self._give_up_ahead():
                state.checkpoint_bytes = known  # what does not fit is not granted either
                raise BudgetError(
                    f"the shards in the cache, {checkpoint_bytes / 1e9:.3f} GB of checkpoints and "
                    f"the logs take {charge / 1e9:.3f} GB, more than the disk budget",
                    f"give --max-disk {charge / 1e9 + 0.0005:.3f} or more",
                )

    # ── what the cache held at the start ────────────────────────────────────────────────────

    def adopt(self, complete: dict[int, tuple[str, int]], partial: dict[int, int]) -> None:
        """Take over what an earlier run left, as far as it is wanted now and fits; delete the rest.

        Args:
            complete: shard → (path, size in bytes) of whole files.
            partial: shard → bytes of partial files.
        """
        state = self.state
        for shard, (path, size) in complete.items():
            file = state.files[shard]
            file.state, file.path, file.reserved_bytes = FileState.CACHED, path, size
        for shard, have in partial.items():
            file = state.files[shard]
            whole = state.plan.shards[shard].size_bytes
            file.have_bytes = have
            file.reserved_bytes = max(have, whole or 0)
        held = set(complete) | set(partial)
        sizes = {shard: state.files[shard].reserved_bytes for shard in held}
        for shard in held:  # not yet anybody's: attaching takes them up one by one
            state.files[shard].reserved_bytes = 0
        self.attach(sizes)
        for shard in sorted(held):
            if not state.files[shard].users:
                state.files[shard].reserved_bytes = sizes[shard]
                self._delete(state.files[shard])

    # ── attaching runs to files ─────────────────────────────────────────────────────────────

    def attach(self, on_disk: dict[int, int] | None = None) -> None:
        """Set bytes aside for runs, current ones first, then as far ahead as the budget allows."""
        state = self.state
        fits = True
        for depth in range(max((len(lane.runs) for lane in state.lanes), default=0)):
            for lane in state.lanes:
                run = lane.runs[depth] if len(lane.runs) > depth else None
                if run is None or run.attached or run.ended:
                    continue
                if depth > 0 and not state.confirmed and run.shard not in (on_disk or {}):
                    continue  # nothing is begun ahead before it is sure what checkpoints need
                fits &= self._attach(run, depth, on_disk or {})
                if depth > 0 and not fits:
                    return
            if not fits or state.checkpoint_bytes is None or self._waiting():
                return  # what is needed now, and what checkpoints need, comes first

    def _attach(self, run: Run, depth: int, on_disk: dict[int, int]) -> bool:
        file = self.state.files[run.shard]
        if not self._local(file):
            if self._doomed(file):
                return False
            want = (
                file.reserved_bytes or on_disk.get(run.shard, 0) or self._first_grant(file, depth)
            )
            file.users.add((run.lane, run.sequence))
            fits = self._fits(file, want) or (depth == 0 and self._make_room(file, want))
            if not fits:
                file.users.discard((run.lane, run.sequence))
                return False
        else:
            file.users.add((run.lane, run.sequence))
        run.attached = True
        return True

    def _first_grant(self, file: File, depth: int) -> int:
        size, step = self.state.plan.shards[file.shard].size_bytes, self.state.plan.grant_step_bytes
        if size is not None:
            return size
        return max(step, file.needs_bytes) if depth else step

    def _doomed(self, file: File) -> bool:
        """Whether its fetcher has been killed: the file goes when the death is known."""
        return file.worker is not None and self.state.workers[file.worker].killed

    def _currents(self) -> set[tuple[int, int]]:
        """The runs that their lanes read now."""
        return {(lane.index, lane.runs[0].sequence) for lane in self.state.lanes if lane.runs}

    def _waiting(self) -> bool:
        """Whether a lane's current shard has outgrown its bytes: nothing may be fetched ahead."""
        growing = self.state.growing()
        return bool(growing) and any(file.users & self._currents() for file in growing)

    def _make_room(self, file: File, want: int) -> bool:
        """Give up shards fetched ahead, the furthest first, until the reservation fits."""
        while not self._fits(file, want):
            if not self._give_up_ahead():
                return False
        return True

    def _give_up_ahead(self) -> bool:
        """Give up the furthest of the shards fetched ahead; False if there is none.

        One that is being read ahead goes when its decompressor is dead: an open file would keep
        its bytes.
        """
        ahead = [
            run
            for lane in self.state.lanes
            for depth, run in enumerate(lane.runs)
            if depth > 0 and run.attached and not self._local(self.state.files[run.shard])
        ]
        ahead.sort(key=lambda run: (run.worker is None, run.sequence, run.lane))
        if not ahead:
            return False
        run = ahead[-1]
        if run.worker is None:
            self._detach(run)
            return True
        self.kill(run.worker, "the shard that it reads ahead has to make room")
        return False

    def kill(self, name: str, reason: str) -> None:
        """End a worker for no fault of its own, once."""
        worker = self.state.workers[name]
        if not worker.killed:
            worker.killed = True
            self.state.emit(Kill(name, reason))

    def pause(self) -> None:
        """The disk is full: fetch nothing for a while, and give up what was fetched ahead."""
        self.state.disk_full_until = self.state.now + self.state.plan.disk_full_retry_s
        while self._give_up_ahead():
            pass

    def _detach(self, run: Run) -> None:
        """The run no longer uses its file; a file that nobody uses is deleted."""
        file = self.state.files[run.shard]
        file.users.discard((run.lane, run.sequence))
        run.attached = False
        if not file.users:
            self.drop(file)

    def drop(self, file: File) -> None:
        """Delete a file that nobody uses; a fetch under way is ended first (the deletion follows
        the fetcher's death)."""
        if self._local(file):
            return
        if file.worker is not None:
            self.kill(file.worker, "its shard is not wanted any more")
            return
        self._delete(file)

    def _delete(self, file: File) -> None:
        state = self.state
        state.emit(Evict(file.shard, file.reserved_bytes))
        if file.state is FileState.CACHED:
            state.evicted_shards += 1
            state.evicted_bytes += file.reserved_bytes
            state.note(
                "shard_evicted",
                shard=state.plan.shards[file.shard].name,
                size_bytes=file.reserved_bytes,
            )
        file.state, file.path = FileState.ABSENT, None
        file.reserved_bytes = file.have_bytes = 0
        file.wants_more = False

    # ── runs that are complete ──────────────────────────────────────────────────────────────

    def complete(self, lane: Lane) -> None:
        """The lane's current run is done with: the next takes its place, its file may go."""
        run = lane.runs.popleft()
        if not run.attached:
            return
        file = self.state.files[run.shard]
        if lane.runs and lane.runs[0].shard == run.shard:  # the same shard again: keep it
            file.users.add((lane.index, lane.runs[0].sequence))
            lane.runs[0].attached = True
        self._detach(run)

    # ── handing out ─────────────────────────────────────────────────────────────────────────

    def assign(self) -> None:
        """Grant growth that was refused before, attach what fits, hand fetches to idle fetchers."""
        state = self.state
        if state.disk_full_until > state.now:
            return
        for file in state.growing():
            self._grow(file)
        self.attach()
        wanted = [
            run
            for depth in range(max(map(len, (lane.runs for lane in state.lanes)), default=0))
            if depth == 0 or state.confirmed
            for lane in state.lanes
            if len(lane.runs) > depth and (run := lane.runs[depth]).attached and not run.ended
        ]
        for run in wanted:
            file = state.files[run.shard]
            if file.state is not FileState.ABSENT or file.not_before > state.now:
                continue
            idle = state.idle("fetcher", lambda worker: worker.file is None)
            if not idle:
                return
            self._fetch(idle[0], file)

    def _fetch(self, worker: Worker, file: File) -> None:
        shard = self.state.plan.shards[file.shard]
        worker.file, file.worker, file.state = file, worker.name, FileState.FETCHING
        self.state.give(
            worker,
            Fetch(
                shard=file.shard,
                url=shard.url,
                name=shard.name,
                key=shard.key,
                size_bytes=shard.size_bytes,
                version=shard.version,
                limit_bytes=file.reserved_bytes,
                sha256=shard.sha256,
            ),
        )

    def _grow(self, file: File) -> None:
        """Answer a ReserveMore, or let it wait; a shard fetched ahead is given up instead."""
        state = self.state
        want = file.reserved_bytes + state.plan.grant_step_bytes
        if not state.confirmed and want > self.floor:
            return  # only when it is sure what checkpoints need
        current = bool(file.users & self._currents())
        fits = self._fits(file, want) or (current and self._make_room(file, want))
        if current and not fits:  # the rest of the room, where there is less than a step
            room = state.plan.budget_bytes - self.charge_bytes()
            want = min(want, max(file.reserved_bytes, self.floor) + room)
            fits = want > file.reserved_bytes and self._fits(file, want)
        if fits:
            file.wants_more = False
            assert file.worker is not None
            state.workers[file.worker].heard = state.now  # it is only now that it has work again
            state.emit(Send(file.worker, Grant(file.shard, want)))
        elif not current:
            file.needs_bytes = want
            for lane in state.lanes:
                for run in lane.runs:
                    if run.shard == file.shard and run.attached:
                        self._detach(run)

    # ── what fetchers say ───────────────────────────────────────────────────────────────────

    def fetched(self, worker: Worker, message: ShardFetched) -> None:
        file = self._finish(worker)
        state = self.state
        file.state = FileState.CACHED
        file.path = f"{state.plan.cache_dir}/{message.file_name}"
        file.reserved_bytes = message.size_bytes
        file.kills = 0
        state.fetched_shards += 1
        state.fetched_bytes += message.size_bytes
        state.refetched_bytes += message.refetched_bytes
        state.note(
            "shard_fetched",
            shard=state.plan.shards[file.shard].name,
            size_bytes=message.size_bytes,
        )
        if not file.users:
            self.drop(file)

    def progress(self, worker: Worker, message: FetchProgress) -> None:
        if worker.file is not None:
            worker.file.have_bytes = message.have_bytes

    def reserve_more(self, worker: Worker, message: ReserveMore) -> None:
        assert worker.file is not None
        worker.file.have_bytes = message.have_bytes
        worker.file.wants_more = True

    def failed(self, worker: Worker, message: FetchFailed) -> None:
        file = self._finish(worker)
        state = self.state
        if message.disk_full:
            file.not_before = state.now + state.plan.disk_full_retry_s
            state.note("disk_full", level="warning", what=message.what, remedy=message.remedy)
        else:
            self.give_up(file, SourceError(message.what, message.remedy))
        if not file.users:
            self.drop(file)

    def _finish(self, worker: Worker) -> File:
        file = worker.file
        assert file is not None
        self.state.answered(worker)
        worker.file, file.worker, file.wants_more = None, None, False
        file.state = FileState.ABSENT
        return file

    def died(self, worker: Worker) -> None:
        """A fetcher died: its partial file and reservation stay for the next one."""
        file = worker.file
        if file is None:
            return
        worker.file, file.worker, file.wants_more = None, None, False
        file.state = FileState.ABSENT
        if not file.users:
            self._delete(file)
        elif not worker.killed:
            file.kills = file.kills + 1 if file.have_bytes <= file.died_at_bytes else 1
            file.died_at_bytes = max(file.died_at_bytes, file.have_bytes)
            if file.kills >= self.state.plan.max_kills:
                name = self.state.plan.shards[file.shard].name
                self.give_up(
                    file,
                    SourceError(
                        f"{name}: fetching it has killed {file.kills} fetchers",
                        "see log.txt; --max-bad-shards lets the run go on without it",
                    ),
                )

    # ── shards that cannot be had ───────────────────────────────────────────────────────────

    def damaged(self, file: File, error: SourceError | ShardError) -> bool:
        """The cached copy is not what was fetched: fetch it again. False if that was tried."""
        file.damaged += 1
        if self._local(file) or file.damaged >= _MAX_DAMAGED:
            return False
        self.state.note("cached_shard_damaged", level="warning", what=error.what)
        reserved = file.reserved_bytes
        self._delete(file)
        file.reserved_bytes = self.state.plan.shards[file.shard].size_bytes or reserved
        return True

    def give_up(self, file: File, error: SourceError | ShardError) -> None:
        """Leave out the rest of a shard in every run that is open on it, or end the run."""
        for lane in self.state.lanes:
            for run in list(lane.runs):
                if run.shard == file.shard and not run.ended and self.state.failure is None:
                    self.skip_rest(run, error)

    def skip_rest(self, run: Run, error: SourceError | ShardError) -> None:
        """Leave out the rest of one run's shard if the run allows it, or end with the error."""
        state = self.state
        begin = state.lanes[run.lane].begin
        consumed = begin.token and (begin.sequence, begin.block) == (run.sequence, run.next_block)
        if consumed or state.bad_shards >= state.plan.max_bad_shards:
            allowed = state.plan.max_bad_shards
            error.remedy += f" (--max-bad-shards is {allowed})" if allowed else ""
            state.fail(error)
            return
        state.bad_shards += 1
        run.leave_out(run.next_block)
        state.skips.append(Skip(run.lane, run.sequence, run.next_block, True, error.what))
        state.note("shard_skipped", level="warning", what=error.what, block=run.next_block)
        if run.attached and state.files[run.shard].state is not FileState.CACHED:
            self._detach(run)

    def starving(self) -> BudgetError | None:
        """The error of a run that cannot go on because a shard of unknown length outgrew it."""
        for file in self.state.growing():
            shard = self.state.plan.shards[file.shard]
            return BudgetError(
                f"{shard.name} is longer than {file.reserved_bytes / 1e9:.3f} GB (its server "
                f"does not say how long) and the disk budget has no room for more of it",
                "give a larger --max-disk or fewer --lanes; or --max-disk 0, which streams shards "
                "through memory",
            )
        return None
