"""One token stream made in ranges of shards: how it is cut, and the folder that holds it.

Runs in: the driver of `tokenize --ray`, and its tasks.

    DIR/ranges.json                  what the stream depends on, and how it is cut
    DIR/range-00003/tokens_*.bin     a range's tokens: what `tokenize` writes of these shards
    DIR/range-00003/done.json        the range is whole: durable, and written last
    DIR/tokens.json                  the stream is whole: its ranges in order, and its sha256

Every document begins with its own end-of-text token and shards follow one another, so the tokens
of DIR/range-*/tokens_*.bin in the order of their names are those of one run over all shards.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from pipeline import catalog, durable, encoding, identity
from pipeline.catalog import Shard
from pipeline.errors import ConfigError, CursorMismatchError, ShardError
from pipeline.supervisor import Job
from pipeline.workers import writer

CUT_FILE = "ranges.json"
DONE_FILE = "done.json"
STREAM_FILE = "tokens.json"
_MOST = 100_000  # the names of more would not sort
_HASH_BYTES = 1 << 22
_T = TypeVar("_T")


class Done(msgspec.Struct, frozen=True):
    """What is known of a range that is whole. cpu_s: of the attempt that finished it."""

    tokens: int
    documents: int
    sha256: str
    shards: int
    text_bytes: int
    bad_records: int
    filtered: int
    restarts: int
    fetched_shards: int
    cpu_s: float
    wall_s: float
    peak_disk_bytes: int
    peak_rss_bytes: int
    host: str


class Range(NamedTuple):
    """Consecutive shards that one task tokenizes."""

    number: int
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        return f"range-{self.number:05d}"

    @property
    def size_bytes(self) -> int:
        """As far as it is known."""
        return sum(shard.size_bytes or 0 for shard in self.shards)


def cut(shards: Sequence[Shard], range_bytes: int) -> list[Range]:
    """The ranges, in order. Pure.

    Raises:
        ConfigError: there would be too many.
    """
    dealt = catalog.deal(shards, range_bytes)
    if len(dealt) > _MOST:
        raise ConfigError(
            f"{len(dealt):,} ranges of {range_bytes / 1e9:g} GB are more than {_MOST:,}",
            "give --range-gb more",
        )
    return [Range(number, _alone(ones)) for number, ones in enumerate(dealt)]


def _alone(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    """Shards as a catalog of their own."""
    return tuple(msgspec.structs.replace(shard, index=index) for index, shard in enumerate(shards))


def job_of(job: Job, one: Range) -> Job:
    """The run that tokenizes a range; its cache folder is the host's affair."""
    folder = Path(job.run_dir).absolute() / one.name
    return msgspec.structs.replace(job, run_dir=str(folder), shards=one.shards)


# ── the folder ──────────────────────────────────────────────────────────────────────────────


def begin(job: Job, shards: Sequence[Shard], range_bytes: int) -> None:
    """Say what the folder holds, or see that it is this.

    Raises:
        CursorMismatchError: it holds another stream, or one that is cut otherwise; says how.
        ConfigError: it holds the files of a run that was not made in ranges.
    """
    out = Path(job.run_dir)
    if (out / writer.STATE_FILE).exists():
        raise ConfigError(
            f"{out} holds the tokens of a run without --ray",
            "give another --out, or leave --ray out",
        )
    now = identity.identity(job.config, shards, lanes=1) | {
        "--range-gb": f"{range_bytes / 1e9:g}",
        "--file-tokens": str(job.file_tokens),
    }
    path = out / CUT_FILE
    if not path.exists():
        durable.write(path, msgspec.json.encode(now))
        return
    then = _read(path, dict[str, str])
    differing = [
        f"{key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
        for key in sorted(then | now)
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise CursorMismatchError(
            f"{out} belongs to another token stream: " + "; ".join(differing),
            "go on with the same shards and settings, or start over with --fresh",
        )


def start_over(out: Path) -> None:
    """Forget everything; the command line has asked."""
    (out / STREAM_FILE).unlink(missing_ok=True)
    for folder in folders(out):
        shutil.rmtree(folder)
    (out / CUT_FILE).unlink(missing_ok=True)


def folders(out: Path) -> list[Path]:
    """Of the ranges that have been begun."""
    return sorted(out.glob("range-[0-9][0-9][0-9][0-9][0-9]"))


def finish(folder: Path, done: Done) -> None:
    """Say that a range is whole; its files are durable."""
    durable.write(folder / DONE_FILE, msgspec.json.encode(done))


def read_done(job: Job, one: Range) -> Done | None:
    """What there is of a range that is whole, its files looked at; None if it is not.

    Raises:
        ShardError: a file is missing or is not as long as it was.
    """
    path = Path(job.run_dir) / one.name / DONE_FILE
    if not path.exists():
        return None
    done = _read(path, Done)
    for file, size in _files(job, path.parent, done.tokens):
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ShardError(
                f"{file} {what}",
                f"put it back, or delete {path.parent}: the same command then makes it again",
            )
    return done


def _files(job: Job, folder: Path, tokens: int) -> Iterator[tuple[Path, int]]:
    """The files of a whole range, in order, with their sizes."""
    tokenizer = job.config.data.tokenizer
    width = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size).dtype.itemsize
    for index, first in enumerate(range(0, tokens, job.file_tokens)):
        count = min(job.file_tokens, tokens - first)
        yield folder / writer.file_name(index), writer.HEADER_BYTES + count * width


def tokens_so_far(out: Path, one: Range) -> int:
    """Tokens of a range that are durable."""
    state = writer.read_state(out / one.name)
    return state.tokens if state else 0


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} is damaged: {error}", "start over with --fresh") from error


# ── the whole ───────────────────────────────────────────────────────────────────────────────


class Whole:
    """The sha256 of the stream's first ranges. A range is hashed when all before it have been.

    Args:
        job: The order's.
        ranges: All of them.
    """

    def __init__(self, job: Job, ranges: Sequence[Range]) -> None:
        self._job, self._ranges = job, ranges
        self._sha256 = hashlib.sha256()
        self._next = 0

    def take(self, done: dict[int, Done]) -> bool:
        """Hash one more range if it is there; whether it was."""
        if self._next not in done:
            return False
        folder = Path(self._job.run_dir) / self._ranges[self._next].name
        for path, _ in _files(self._job, folder, done[self._next].tokens):
            with path.open("rb") as file:
                file.seek(writer.HEADER_BYTES)
                while data := file.read(_HASH_BYTES):
                    self._sha256.update(data)
        self._next += 1
        return True

    def hexdigest(self) -> str:
        """Of what was taken."""
        return self._sha256.hexdigest()
