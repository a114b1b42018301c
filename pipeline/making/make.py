"""`shards make`: documents of any form into shards of one form and size.

Runs in: the command line's own process; groups of shards are read and written in processes.

**The same bytes whatever the number of processes.** Inputs are dealt to groups by rule: one after
the other, in the order of the patterns, until a group has four shards' worth of bytes. A group is
read in order by one process and becomes shards of its own, `shard-<group>-<part>`, so nothing
depends on who was faster; names sort in the order of the documents.

**Resumable.** A shard gets its name when it is durable, then a line in its group's journal
(`.making/<group>.jsonl`). A rerun keeps the shards that are there and goes on behind their
documents; where a shard ends depends on its own documents alone, so what follows is the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from pipeline import cache, catalog, durable, manifest, pool
from pipeline.catalog import Shard
from pipeline.codecs import open_records
from pipeline.config import Stream
from pipeline.errors import BadRecordsError, ConfigError
from pipeline.listing import QUIET, Watch
from pipeline.making import targets
from pipeline.manifest import Entry
from pipeline.messages import BadRecord
from pipeline.shard_files import ShardFiles

STATE = ".making"  # journals, and inputs that had to be fetched
_GROUP_SHARDS = 4  # shards' worth of input that a group gathers
_NAMED_BAD = 100
_UNBOUNDED = 1 << 62


class Order(msgspec.Struct, frozen=True):
    """What is to be made."""

    patterns: tuple[str, ...]
    out: str
    form: str
    shard_bytes: int
    text_field: str = "text"
    max_bad_records: int = 1000


class Result(msgspec.Struct, frozen=True):
    """What was made; kept: shards that an earlier run had made already."""

    inputs: int
    groups: int
    shards: int
    kept: int
    documents: int
    size_bytes: int
    bad_records: int
    manifest: str


class _Group(NamedTuple):
    """Inputs that one process reads in order."""

    number: int
    shards: tuple[Shard, ...]


class Done(NamedTuple):
    """What has come of a group."""

    entries: tuple[Entry, ...]
    kept: int
    num_bad: int
    bad: tuple[tuple[str, BadRecord], ...]  # the first of them, with their shard's name


def groups(shards: Sequence[Shard], shard_bytes: int) -> list[_Group]:
    """Deal the inputs. Pure. One of unknown size fills a group alone."""
    dealt = catalog.deal(shards, _GROUP_SHARDS * shard_bytes)
    return [_Group(number, ones) for number, ones in enumerate(dealt)]


def inputs(order: Order, watch: Watch = QUIET) -> tuple[Shard, ...]:
    """The shards to read. Raises: ConfigError, SourceError."""
    return catalog.build(order.patterns, Stream().source_options(), watch=watch)


def make(
    order: Order,
    shards: Sequence[Shard],
    processes: int,
    tell: Callable[[int, int, int, int], None] = lambda *numbers: None,
) -> Result:
    """Make the shards that are not there yet, and the manifest.

    Args:
        order: What to make.
        shards: See inputs.
        processes: That read and write.
        tell: Called with (groups done, groups, shards, documents) now and then.

    Raises:
        ConfigError: the folder holds shards of another order.
        ShardError: an input cannot be read, or its fields do not fit the form.
        BadRecordsError: more records are bad than the order allows.
        SourceError: an input cannot be fetched.
        OSError: the disk is full.
    """
    out = Path(order.out)
    state = out / STATE
    durable.make_folder(state)
    todo = groups(shards, order.shard_bytes)
    with ExitStack() as stack:
        lock = stack.enter_context(cache.own(state))
        _refuse_other(state, order, shards)
        files = ShardFiles(state, lock, _UNBOUNDED, Stream().source_options())
        workers = stack.enter_context(pool.processes(processes))
        done: dict[int, Done] = {}
        with ThreadPoolExecutor(processes) as threads:
            try:
                waiting = {
                    threads.submit(_one, order, group, files, workers): group for group in todo
                }
                for future in as_completed(waiting):
                    done[waiting[future].number] = future.result()
                    _check_bad(order, done)
                    made = [entry for one in done.values() for entry in one.entries]
                    total = sum(entry.documents or 0 for entry in made)
                    tell(len(done), len(todo), len(made), total)
            except BaseException:  # also Ctrl-C: what was begun is begun again next time
                threads.shutdown(wait=False, cancel_futures=True)
                files.stop()
                pool.end(workers)
                raise
    entries = [entry for number in sorted(done) for entry in done[number].entries]
    manifest.write(out / manifest.FILE_NAME, entries)
    return Result(
        inputs=len(shards),
        groups=len(todo),
        shards=len(entries),
        kept=sum(one.kept for one in done.values()),
        documents=sum(entry.documents or 0 for entry in entries),
        size_bytes=sum(entry.size_bytes or 0 for entry in entries),
        bad_records=sum(one.num_bad for one in done.values()),
        manifest=str(out / manifest.FILE_NAME),
    )


def _one(order: Order, group: _Group, files: ShardFiles, workers: ProcessPoolExecutor) -> Done:
    """A group, its inputs fetched where they are not on this disk. Runs in: a thread."""
    finished = _finished(order, group.number)
    if finished is not None:
        return finished
    with ExitStack() as stack:
        paths = [(stack.enter_context(files.use(shard)), shard.name) for shard in group.shards]
        done = workers.submit(write_group, order, group.number, paths).result()
    for shard in group.shards:
        files.drop(shard)
    return done


def _check_bad(order: Order, done: dict[int, Done]) -> None:
    count = sum(one.num_bad for one in done.values())
    if count > order.max_bad_records:
        name, last = next(bad for one in reversed(done.values()) for bad in one.bad)
        raise BadRecordsError(
            f"{count} bad records, one of them in {name}, {last.place}: {last.reason}",
            f"--max-bad-records allows more than {order.max_bad_records}; is --text-field right?",
        )


def _refuse_other(state: Path, order: Order, shards: Sequence[Shard]) -> None:
    """A folder holds the shards of one order. Raises: ConfigError."""
    listing = [(shard.name, shard.size_bytes, shard.version) for shard in shards]
    now = {"form": order.form, "shard_bytes": order.shard_bytes, "text_field": order.text_field,
           "inputs": listing}  # fmt: skip
    path, said = state / "order.json", msgspec.json.encode(now)
    if not path.exists():
        with path.open("wb") as file:
            file.write(said)
            durable.sync(file)
        durable.sync_folder(state)
        return
    then = msgspec.json.decode(path.read_bytes())
    again = msgspec.json.decode(said)
    differing = [key for key in again if then.get(key) != again[key]]
    if differing:
        raise ConfigError(
            f"{order.out} holds shards that were made with other {', '.join(differing)}",
            "give another --out, or the same inputs and options as then to go on",
        )


# ── one group ───────────────────────────────────────────────────────────────────────────────


def _journal(order: Order, group: int) -> Path:
    return Path(order.out) / STATE / f"{group:05d}.jsonl"


def _kept(order: Order, group: int) -> tuple[list[Entry], dict[str, Any] | None]:
    """The shards of a group that are whole and there, and its last line if it has ended."""
    path = _journal(order, group)
    entries: list[Entry] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            said = msgspec.json.decode(line)
        except msgspec.DecodeError:  # cut by a crash
            break
        if "ended" in said:
            return entries, said
        entry = msgspec.convert(said, Entry)
        made = Path(order.out) / entry.name
        if not made.exists() or made.stat().st_size != entry.size_bytes:
            break
        entries.append(entry)
    return entries, None


def _finished(order: Order, group: int) -> Done | None:
    entries, ended = _kept(order, group)
    if ended is None:
        return None
    bad = tuple((name, BadRecord(place, why)) for name, place, why in ended["bad"])
    return Done(tuple(entries), len(entries), ended["num_bad"], bad)


def write_group(order: Order, group: int, paths: Sequence[tuple[str, str]]) -> Done:
    """Read a group's inputs and write its shards. Runs in: a process of the pool.

    Args:
        order: What to make.
        group: Its number.
        paths: (path, name) of its inputs, in order.
    """
    entries, _ = _kept(order, group)
    kept = len(entries)
    bad: list[tuple[str, BadRecord]] = []
    with _journal(order, group).open("wb") as journal:

        def note(line: Any) -> None:
            journal.write(msgspec.json.encode(line) + b"\n")
            durable.sync(journal)

        def done(entry: Entry) -> None:
            entries.append(entry)
            note(entry)

        for entry in entries:
            journal.write(msgspec.json.encode(entry) + b"\n")
        files = targets.Files(Path(order.out), f"shard-{group:05d}", order.form, kept, done)
        count = _copy(
            order, group, paths, files, sum(entry.documents or 0 for entry in entries), bad
        )
        named = [(name, one.place, one.reason) for name, one in bad]
        note({"ended": True, "num_bad": count, "bad": named})
    return Done(tuple(entries), kept, count, tuple(bad))


def _copy(
    order: Order,
    group: int,
    paths: Sequence[tuple[str, str]],
    files: targets.Files,
    skip: int,
    bad: list[tuple[str, BadRecord]],
) -> int:
    """Write the group's records behind the first `skip`; returns how many were bad."""
    writer = targets.target(files, order.form, order.shard_bytes)
    num_bad, number = 0, 0
    try:
        for name, item in _records(paths, order.text_field):
            if isinstance(item, BadRecord):
                num_bad += 1
                if len(bad) < _NAMED_BAD:
                    bad.append((name, item))
                continue
            count = item.num_rows if isinstance(item, pa.RecordBatch) else 1
            first = number
            number += count
            if number <= skip:
                continue
            if isinstance(item, pa.RecordBatch):
                item, first = item.slice(max(0, skip - first)), max(skip, first)  # noqa: PLW2901
                writer.write_rows(item, functools.partial(_key_of_row, group, first))
            else:
                writer.write(_one_line(item), _key(group, first))
        writer.close()
    except BaseException:
        files.abandon()
        raise
    return num_bad


def _records(
    paths: Sequence[tuple[str, str]], text_field: str
) -> Iterator[tuple[str, bytes | pa.RecordBatch | BadRecord]]:
    for path, name in paths:
        with contextlib.closing(open_records(path, name, text_field)) as records:
            for record in records:
                yield name, record


def _key(group: int, document: int) -> str:
    """A document's name in a tar: unique in the set, and in order."""
    return f"{group:05d}{document:09d}"


def _key_of_row(group: int, first: int, row: int) -> str:
    return _key(group, first + row)


def _one_line(record: bytes) -> bytes:
    return msgspec.json.format(record, indent=-1) if b"\n" in record else record
