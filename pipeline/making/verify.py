"""`shards verify`: a set of shards against its manifest, every record read.

Runs in: the command line's own process; shards are read in processes. A shard that is elsewhere is
read where it lies, once for its sha256 and once for its records: none of it comes onto the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import as_completed
from pathlib import Path
from typing import BinaryIO

import msgspec

from pipeline import catalog, manifest, pool
from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.config import Stream
from pipeline.errors import ConfigError, ShardError, SourceError
from pipeline.making.targets import FORMS
from pipeline.manifest import Entry
from pipeline.messages import BadRecord, Remote
from pipeline.remote_file import open_remote
from pipeline.sources import scheme_of

_NAMED = 100  # problems that are named of one shard
_CHUNK_BYTES = 1 << 20


class Problem(msgspec.Struct, frozen=True):
    """What is wrong; record is empty where it is the shard itself."""

    shard: str
    record: str
    what: str


class Checked(msgspec.Struct, frozen=True):
    """What a shard holds, and what is wrong with it."""

    shard: str
    documents: int
    size_bytes: int
    num_problems: int
    problems: tuple[Problem, ...]  # the first of them


class Report(msgspec.Struct, frozen=True):
    """What `shards verify` says. manifest: '' where the folder has none."""

    manifest: str
    shards: int
    documents: int
    size_bytes: int
    num_problems: int
    problems: tuple[Problem, ...]


def verify(
    path: Path,
    text_field: str,
    processes: int,
    tell: Callable[[int, int, Checked], None] = lambda done, total, one: None,
) -> Report:
    """Check a set.

    Args:
        path: A manifest, or a folder; one without a manifest is only read.
        text_field: Field or column with the text.
        processes: That read.
        tell: Called with (done, all, a shard that was checked).

    Raises:
        ConfigError: there is nothing to check, or the manifest is none.
    """
    known = path / manifest.FILE_NAME if path.is_dir() else path
    folder = known.parent
    if known.exists() or not path.is_dir():
        entries = list(manifest.read(known).entries.values())
        strangers = _strangers(folder, {entry.name for entry in entries})
    else:
        known, strangers = Path(), []
        entries = [Entry(one.name) for one in _shards(folder)]
    if not entries:
        raise ConfigError(f"{path} has no shards", "give a manifest, or a folder of shards")
    checked: list[Checked] = []
    with pool.processes(min(processes, len(entries))) as workers:
        waiting = [workers.submit(check, str(folder), entry, text_field) for entry in entries]
        for future in as_completed(waiting):
            checked.append(future.result())
            tell(len(checked), len(entries), checked[-1])
    checked.sort(key=lambda one: one.shard)
    return Report(
        manifest="" if known == Path() else str(known),
        shards=len(checked),
        documents=sum(one.documents for one in checked),
        size_bytes=sum(one.size_bytes for one in checked),
        num_problems=sum(one.num_problems for one in checked) + len(strangers),
        problems=tuple(problem for one in checked for problem in one.problems) + tuple(strangers),
    )


def _shards(folder: Path) -> list[Path]:
    endings = tuple(f".{form}" for form in FORMS)
    return sorted(one for one in folder.iterdir() if one.name.endswith(endings)
                  and one.name != manifest.FILE_NAME)  # fmt: skip


def _strangers(folder: Path, known: set[str]) -> list[Problem]:
    """Shards beside the manifest that it does not know: a run on the folder would read them."""
    others = (one.name for one in _shards(folder) if one.name not in known)
    return [Problem(name, "", "the manifest does not have it") for name in others]


def check(folder: str, entry: Entry, text_field: str) -> Checked:
    """One shard: size, sha256, number of documents, and every record. Runs in: a process."""
    problems: list[Problem] = []
    count = 0

    def wrong(what: str, record: str = "") -> None:
        nonlocal count
        count += 1
        if count <= _NAMED:
            problems.append(Problem(entry.name, record, what))

    documents, size = 0, None
    try:
        size, opened = _find(folder, entry)
        if entry.size_bytes not in (None, size):
            wrong(f"it has {size} bytes, and {entry.size_bytes} in the manifest")
        elif entry.sha256 is not None and entry.sha256 != (found := _sha256(opened)):
            wrong(f"its sha256 is {found}, and {entry.sha256} in the manifest")
        for item in open_documents(opened(), entry.name, text_field):
            match item:
                case BadRecord():
                    wrong(item.reason, item.place)
                case bytes():
                    documents += 1
                case Texts():
                    documents += len(item.offsets) - 1
        if entry.documents not in (None, documents):
            wrong(f"it has {documents} documents, and {entry.documents} in the manifest")
    except FileNotFoundError:
        wrong(f"there is no such file in {folder}")
    except (ShardError, SourceError) as error:
        wrong(error.what)
    return Checked(entry.name, documents, size or 0, count, tuple(problems))


def _find(folder: str, entry: Entry) -> tuple[int | None, Callable[[], BinaryIO]]:
    """A shard's size, and what opens it; one that is elsewhere is read where it lies.

    Raises:
        FileNotFoundError, SourceError: it is not there.
    """
    address = entry.url or entry.name
    if not scheme_of(address):
        path = Path(folder) / entry.name
        return path.stat().st_size, lambda: path.open("rb")
    options = Stream().source_options()
    (shard,) = catalog.build([address], options)
    local = catalog.local_path(shard.url)
    if local is not None:
        return shard.size_bytes, lambda: Path(local).open("rb")
    remote = Remote(shard.url, shard.size_bytes, shard.version)
    return shard.size_bytes, lambda: open_remote(remote, shard.name, options, lambda: None)


def _sha256(opened: Callable[[], BinaryIO]) -> str:
    digest = hashlib.sha256()
    with opened() as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()
