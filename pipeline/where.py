"""What an update was trained on: shard, document and bytes of every row of its batch.

Runs in: the command line's own process, for `where`; shards are read in processes of their own.

Nothing is kept for this while a run trains. A checkpoint's cursor says where the lanes stood at
its step (a run begins at zero); from there the lanes are read again, and the rule of turns.py says
which windows the update took. Where the run has logged a hash of that batch, the tokens found
here must have it: what is printed is then what was trained on, not what should have been.

The cost is reading and encoding from the nearest earlier checkpoint on, in parallel over lanes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import numpy as np
import yaml

from pipeline import (
    blocks,
    cache,
    catalog,
    checkpoints,
    filters,
    identity,
    manifest,
    mixture,
    page,
    pool,
    provenance,
)
from pipeline.catalog import Shard
from pipeline.checkpoints import Checkpoint
from pipeline.config import Config, from_plain
from pipeline.errors import CacheInUseError, ConfigError, ShardError
from pipeline.lanes import Lanes
from pipeline.listing import QUIET, Watch
from pipeline.messages import Cursor, LaneCursor, Skip
from pipeline.provenance import Part, Reading, Wanted
from pipeline.shard_files import ShardFiles
from pipeline.turns import Group, Turns, batch_hash, row_digest


class Document(msgspec.Struct, frozen=True):
    """A document's part of a row: tokens [a, b) of the window, bytes [a, b) of its text."""

    shard: str
    epoch: int
    record: int  # of the shard, from 0
    block: int
    tokens: tuple[int, int]
    bytes: tuple[int, int]
    id: str | None = None
    url: str | None = None


class Row(msgspec.Struct, frozen=True):
    """One window of the batch, T + 1 tokens from a position of a lane on."""

    row: int
    lane: int
    position: int
    documents: tuple[Document, ...]


class Answer(msgspec.Struct, frozen=True):
    """What `where` says. verified: the batch has the hash that the run has logged; None: it has
    logged none."""

    run: str
    step: int
    from_step: int  # the checkpoint that was begun from; 0: the run's beginning
    batch_hash: str
    verified: bool | None
    fetched_shards: int
    rows: tuple[Row, ...]


class Request(NamedTuple):
    """What is asked for."""

    run_dir: Path
    step: int
    row: int | None = None
    shards: tuple[str, ...] = ()  # patterns, where the run's own held secrets
    cache_dir: str | None = None
    max_disk_gb: float | None = None
    processes: int = 2


def find(
    request: Request, tell: Callable[[str], None] = lambda text: None, watch: Watch = QUIET
) -> Answer:
    """Find the documents of a batch.

    Args:
        request: See there.
        tell: Called with a line for every shard that is read.
        watch: Is told how looking for the shards goes.

    Raises:
        ConfigError: there is no such run, step or row, or the shards are not the run's.
        CacheInUseError: the run is going on, and its shards are remote.
        BudgetError, SourceError: a shard has to be fetched again and cannot be; names it.
        ShardError: a shard cannot be read, or the batch is not the one that the run has logged.
    """
    past = _Past.of(request)
    stream = past.config.data.stream
    options = stream.source_options()
    given = None if stream.manifest is None else manifest.read(Path(stream.manifest))
    known = catalog.Known(given, catalog.read_kept(request.run_dir))
    if request.shards:
        if stream.mix:
            raise ConfigError("--shards cannot name the shards of a mix", "leave it out")
        stream = msgspec.structs.replace(stream, shards=list(request.shards))
    shards, counts = mixture.read(stream, options, known, watch)
    groups = mixture.groups(past.config, counts)
    past.refuse_other(shards, groups)
    cache_dir = request.cache_dir or stream.cache_dir or str(request.run_dir / "cache")
    budget = int((request.max_disk_gb or stream.max_disk_gb) * 1e9)
    if request.cache_dir is None:
        budget -= _bytes_beside(request.run_dir, Path(cache_dir))
    lanes = mixture.plan(past.config, shards, counts, groups)
    T = past.config.data.preprocessing.max_context_size
    with ExitStack() as stack:
        if all(catalog.local_path(shard.url) for shard in shards):  # a run may own its cache
            cache_dir = stack.enter_context(TemporaryDirectory(prefix="fineweb-where-"))
        lock = stack.enter_context(_owned(Path(cache_dir)))
        files = ShardFiles(Path(cache_dir), lock, budget, options)
        workers = stack.enter_context(pool.processes(request.processes))
        rows, tokens = _Search(past, shards, lanes, Turns(groups, T), files, workers, tell).batch()
    return _answer(request, past, rows, tokens, files.fetched)


@contextmanager
def _owned(cache_dir: Path) -> Iterator[int]:
    """See cache.own. Raises: CacheInUseError, with what to do about it here."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(cache.own(cache_dir))
        except CacheInUseError as error:
            error.remedy = (
                "give --cache-dir and a folder of its own: shards that are needed are then fetched "
                "into it, within --max-disk; or ask again when the run has ended"
            )
            raise
        yield lock


# ── what is known of the run ────────────────────────────────────────────────────────────────


class _Past(NamedTuple):
    """A run's own records, as far as they matter here.

    begin: the nearest earlier checkpoint; None: the run's beginning. skip: windows between it and
    the update. windows: of the update. batch_hash: as logged.
    """

    config: Config
    begin: Checkpoint | None
    cursor: Cursor | None  # any of this run: they all tell which stream it is
    skips: tuple[Skip, ...]
    skip: int
    windows: int
    batch_hash: str | None

    @classmethod
    def of(cls, request: Request) -> _Past:
        run_dir, step = request.run_dir, request.step
        states = [checkpoints.read(path) for path in checkpoints.whole(run_dir)]
        records = {record["step"]: record for record in _records(run_dir)}
        newest = max([*records, *(one.state.step for one in states)], default=0)
        if step > newest:
            raise ConfigError(f"{run_dir} has come to update {newest}", "give --step that or less")
        begin = max((one for one in states if one.state.step < step),
                    key=lambda one: one.state.step, default=None)  # fmt: skip
        config = _config(run_dir)
        T, update = config.data.preprocessing.max_context_size, _update_tokens(config)
        step0, tokens0 = (begin.state.step, begin.state.tokens) if begin else (0, 0)
        totals = {step0: tokens0} | {n: int(one["total_tokens"]) for n, one in records.items()}
        after = totals.get(step, tokens0 + (step - step0) * update)
        before = totals.get(step - 1, after - update)
        return cls(
            config=config,
            begin=begin,
            cursor=states[-1].cursor if states else None,
            skips=states[-1].cursor.skips if states else (),
            skip=(before - tokens0) // T,
            windows=(after - before) // T,
            batch_hash=records[step]["batch_hash"] if step in records else None,
        )

    def refuse_other(self, shards: Sequence[Shard], groups: tuple[Group, ...]) -> None:
        """Refuse shards that are not the run's. Raises: CursorMismatchError."""
        if self.cursor is not None:
            lanes = sum(group.lanes for group in groups)
            mix = mixture.described(groups)
            entries = identity.identity(self.config, shards, lanes, mix=mix)
            identity.refuse_other(self.cursor, entries, "the run")


def _records(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return page.read(run_dir)
    except ConfigError:  # none yet, or deleted: checkpoints alone will do
        return []


def _config(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    try:
        return from_plain(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{run_dir} is no training run: it has no config.yaml",
            "give the folder of a run, as in runs/demo",
        ) from None


def _update_tokens(config: Config) -> int:
    """Tokens of one update; with an automatic batch the accumulation steps count windows."""
    hyper = config.training.hyperparameters
    batch = 1 if hyper.batch_size == "auto" else hyper.batch_size
    seq_len = config.data.preprocessing.max_context_size
    return batch * hyper.gradient_accumulation_steps * seq_len


def _bytes_beside(run_dir: Path, cache_dir: Path) -> int:
    """Bytes of the run's folder that are no shards."""
    inside = cache_dir.resolve()
    files = [path for path in run_dir.resolve().rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if inside not in path.parents)


# ── the search ──────────────────────────────────────────────────────────────────────────────


class _Lane(NamedTuple):
    """What was read of a lane. end: its length, if that is less than was wanted. parts: with
    shard, epoch and what else is known of the record."""

    wanted: Wanted
    end: int | None
    parts: tuple[tuple[Part, str, int, dict[str, str]], ...]
    tokens: np.ndarray


class _Search:
    """Reads lanes until it is known which windows the update took, and what they held."""

    def __init__(
        self,
        past: _Past,
        shards: Sequence[Shard],
        lanes: Lanes,
        turns: Turns,
        files: ShardFiles,
        workers: ProcessPoolExecutor,
        tell: Callable[[str], None],
    ) -> None:
        self._past, self._shards, self._files, self._pool = past, shards, files, workers
        self._tell = tell
        data = past.config.data
        self._T = data.preprocessing.max_context_size
        self._turns = turns
        self._plan, self._dealing = lanes, threading.Lock()
        zero = (LaneCursor(0, 0, 0, 0),) * self._plan.lanes
        self._begin = past.begin.cursor.lanes if past.begin else zero
        self._reading = Reading(
            text_field=data.stream.text_field,
            block_bytes=data.stream.block_bytes,
            max_documents=blocks.most_documents(data.stream.block_bytes),
            encoding=data.tokenizer.name,
            vocab_size=data.tokenizer.vocab_size,
            share=data.validation.share,
            where=filters.condition(data.filter),
            min_chars=data.filter.min_chars,
            max_chars=data.filter.max_chars,
        )

    def batch(self) -> tuple[list[Row], list[np.ndarray]]:
        """Every row of the update, and its tokens.

        The order depends on where lanes end, and that is known when they have been read: so the
        order is assumed, the lanes are read, and it is done again as long as an end turns up.
        """
        ends: list[int | None] = [None] * self._plan.lanes
        read: dict[int, _Lane] = {}
        while True:
            rows, wanted = self._rows(ends)
            missing = {
                lane: one
                for lane, one in wanted.items()
                if lane not in read or read[lane].wanted != one
            }
            read |= self._read_all(missing)
            before = list(ends)
            for lane, one in read.items():
                ends[lane] = one.end if one.end is not None else ends[lane]
            if ends == before:
                break
        found_rows, tokens = [], []
        for number, (lane, position) in enumerate(rows):
            one, first = read[lane], position - read[lane].wanted.start
            found_rows.append(Row(number, lane, position, self._documents(one, position)))
            tokens.append(one.tokens[first : first + self._T + 1])
        return found_rows, tokens

    def _rows(self, ends: list[int | None]) -> tuple[list[tuple[int, int]], dict[int, Wanted]]:
        """Lane and position of the update's windows if the lanes end so, and what has to be read
        of every lane to see whether they do."""
        positions, rows = [lane.position for lane in self._begin], []
        for number in range(self._past.skip + self._past.windows):
            lane = self._turns.next_lane(positions, ends)
            if lane is None:
                raise ConfigError("the shards end before this update", "are they the run's?")
            if number >= self._past.skip:
                rows.append((lane, positions[lane]))
            positions[lane] += self._T
        wanted = {
            lane: Wanted(tuple(p for at, p in rows if at == lane), self._T + 1, position + 1)
            for lane, position in enumerate(positions)
            if position > self._begin[lane].position
        }
        return rows, wanted

    def _read_all(self, wanted: dict[int, Wanted]) -> dict[int, _Lane]:
        with ThreadPoolExecutor(max(1, len(wanted))) as threads:
            try:
                found = list(threads.map(self._read, wanted, wanted.values()))
            except BaseException:  # also Ctrl-C: what still waits or works is let go
                self._files.stop()
                pool.end(self._pool)
                raise
        return dict(zip(wanted, found, strict=True))

    def _read(self, lane: int, wanted: Wanted) -> _Lane:
        """Read a lane from the cursor to the end of what is wanted. Runs in: a thread a lane."""
        at, end = self._begin[lane], None
        parts: list[tuple[Part, str, int, dict[str, str]]] = []
        tokens: list[np.ndarray] = []
        while at.position < wanted.end:
            with self._dealing:
                turn = self._plan.turn(lane, at.sequence)
            if turn is None:
                end = at.position
                break
            shard = self._shards[turn.shard]
            skips = tuple(
                skip
                for skip in self._past.skips
                if (skip.lane, skip.sequence) == (lane, at.sequence)
            )
            with self._files.use(shard) as path:
                self._tell(f"lane {lane}: {shard.name}")
                found = self._pool.submit(
                    provenance.stretch, path, shard.name, self._reading, at, skips, wanted
                ).result()
            tokens.append(found.tokens)
            parts += [
                (one, shard.name, turn.epoch, found.fields.get(one.record, {}))
                for one in found.parts
            ]
            if not found.ended:
                break
            at = LaneCursor(at.sequence + 1, 0, 0, found.position)
        return _Lane(wanted, end, tuple(parts), np.concatenate(tokens))

    def _documents(self, lane: _Lane, position: int) -> tuple[Document, ...]:
        """What a window holds."""
        return tuple(
            Document(
                shard=shard,
                epoch=epoch,
                record=part.record,
                block=part.block,
                tokens=(part.start - position, part.end - position),
                bytes=(part.first_byte, part.last_byte),
                **fields,
            )
            for part, shard, epoch, fields in lane.parts
            if part.window == position
        )


def _answer(
    request: Request, past: _Past, rows: list[Row], tokens: list[np.ndarray], fetched: int
) -> Answer:
    """Check what was found against what the run has logged. Raises: ShardError, ConfigError."""
    found = batch_hash(map(row_digest, tokens))
    if past.batch_hash not in (None, found):
        raise ShardError(
            f"the batch of update {request.step} has the hash {found} here, and the run has "
            f"logged {past.batch_hash}",
            "a shard has changed since, or was left out after the last checkpoint: see log.txt",
        )
    if request.row is not None and request.row >= len(rows):
        raise ConfigError(f"update {request.step} has {len(rows)} rows", "they count from 0")
    return Answer(
        run=str(request.run_dir),
        step=request.step,
        from_step=past.begin.state.step if past.begin else 0,
        batch_hash=found,
        verified=None if past.batch_hash is None else True,
        fetched_shards=fetched,
        rows=tuple(rows if request.row is None else [rows[request.row]]),
    )
