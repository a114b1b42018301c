"""Every place that shards come from, every form read out of every place, and the README's table.

    python -m tests.places        reads all of them and prints the table

Real servers on the loopback address: HTTP with and without TLS, moto's S3, stand-ins for Google's
and Azure's stores and for the hub. A shard is fetched as a run fetches it, by catalog and fetcher,
or streamed as with --max-disk 0, without standing on the disk.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pipeline import catalog, http_source
from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.messages import Entry, Remote
from pipeline.remote_file import open_remote
from tests.fetched import OPTIONS, Fetched
from tests.forms import COMPRESSIONS, FORMS, Form, Row
from tests.harness import english
from tests.hub import hub_server
from tests.servers import Tls, http_server, s3_server
from tests.stores import store_server

ROWS: list[Row] = [{"id": n, "text": text} for n, text in enumerate(english(40, largest=2000))]
TEXTS = [str(row["text"]) for row in ROWS]


class Shard(NamedTuple):
    """One form, written."""

    form: Form
    kind: str  # of compression
    name: str
    data: bytes


SHARDS = [
    Shard(form, kind, f"{number:02d}-{index}.{form.name}.{kind}".rstrip("."),
          COMPRESSIONS[kind](form.make(ROWS)))
    for number, form in enumerate(FORMS) for index, kind in enumerate(form.compressions)
]  # fmt: skip


# ── places ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, variables):
        yield


@contextmanager
def _file(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    yield str(folder)


@contextmanager
def _http(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    with _file(folder, files), http_server(folder) as url:
        yield url


@contextmanager
def _https(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    with _file(folder, files):
        tls = Tls(folder)
        with (
            _environment(SSL_CERT_FILE=str(tls.certificate)),
            http_server(folder, tls=tls.context) as url,
        ):
            yield url
    http_source._pool.cache_clear()


@contextmanager
def _s3(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    with s3_server("places", files) as variables, _environment(**variables):
        yield "s3://places"


@contextmanager
def _gs(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    with (
        store_server("places", files) as url,
        _environment(GOOGLE_BASE_URL=url, GOOGLE_SKIP_SIGNATURE="true"),
    ):
        yield "gs://places"


@contextmanager
def _az(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_SKIP_SIGNATURE": "true"}
    with (
        store_server("places", files) as url,
        _environment(AZURE_STORAGE_ENDPOINT=url, **account),
    ):
        yield "az://places"


@contextmanager
def _hf(folder: Path, files: dict[str, bytes]) -> Iterator[str]:
    with (
        hub_server(folder, files) as hub,
        _environment(HF_ENDPOINT=hub.url, HF_HOME=str(folder), HF_TOKEN=""),
    ):
        yield "hf://datasets/owner/name"


PLACES: dict[str, Callable[[Path, dict[str, bytes]], Any]] = {
    "file": _file, "http": _http, "https": _https, "s3": _s3, "gs": _gs, "az": _az, "hf": _hf,
}  # fmt: skip


# ── reading ─────────────────────────────────────────────────────────────────────────────────


def digest(texts: Iterable[str | bytes]) -> str:
    """SHA-256 of documents, in order; it tells where one ends."""
    found = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _documents(path: str | Any, name: str) -> Iterator[bytes]:
    for item in open_documents(path, name, "text"):
        if isinstance(item, Texts):
            yield from item.one_by_one()
        elif isinstance(item, bytes):
            yield item
        else:
            assert isinstance(item, Entry), item


def _fetched(folder: Path, url: str) -> str:
    if "://" not in url:  # a file of this disk is read in place
        (shard,) = catalog.build([url], OPTIONS)
        path = catalog.local_path(shard.url)
        assert path is not None
        return path
    fetched = Fetched(folder, url)
    fetched.done()
    return str(fetched.path)


def _streamed(url: str) -> Any:
    (shard,) = catalog.build([url], OPTIONS)
    remote = Remote(shard.url, shard.size_bytes, shard.version)
    return open_remote(remote, shard.name, OPTIONS, lambda: None)


class Ran(NamedTuple):
    """A form that was read out of a place."""

    place: str
    streamed: bool
    title: str
    kind: str


def read(place: str, folder: Path) -> Iterator[tuple[Ran, str]]:
    """Read every form out of a place; the digest of each one's documents."""
    folder.mkdir()
    with ExitStack() as stack:
        files = {shard.name: shard.data for shard in SHARDS}
        base = stack.enter_context(PLACES[place](folder / "served", files))
        for shard in SHARDS:
            url, name = f"{base}/{shard.name}", shard.name
            source: str | Any = _fetched(folder / "cache", url)
            yield Ran(place, False, shard.form.title, shard.kind), digest(_documents(source, name))
            if place != "file":
                ran = Ran(place, True, shard.form.title, shard.kind)
                yield ran, digest(_documents(_streamed(url), name))


# ── the table ───────────────────────────────────────────────────────────────────────────────

Way = tuple[str, bool]  # place, streamed
WAYS: frozenset[Way] = frozenset(
    (place, streamed)
    for place in PLACES
    for streamed in (False, True)
    if (place, streamed) != ("file", True)
)


def table(ran: Iterable[Ran]) -> str:
    """What was read, as Markdown: a column for each compression of the whole file."""
    ways: dict[tuple[str, str], set[Way]] = defaultdict(set)
    for one in ran:
        ways[one.title, one.kind].add((one.place, one.streamed))
    kinds = tuple(COMPRESSIONS)
    heads = ["plain", *(f".{kind}" for kind in kinds[1:])]
    fetched = _listed([place for place in PLACES if (place, False) in WAYS])
    streamed = _listed([place for place in PLACES if (place, True) in WAYS])
    lines = [
        f"All: fetched from {fetched};",
        f"and streamed, without standing on the disk, from {streamed}.",
        "",
        f"| shard | {' | '.join(heads)} | from | filters | a resume begins at |",
        f"|---|{'---|' * (len(heads) + 3)}",
    ]
    for form in FORMS:
        there = [kind for kind in kinds if ways[form.title, kind]]
        marks = ["yes" if kind in there else "" for kind in kinds]
        every = WAYS.intersection(*(ways[form.title, kind] for kind in there)) if there else set()
        columns = "all" if form.columns else "length"
        lines.append(
            f"| {form.title} | {' | '.join(marks)} | {_said(every)} | {columns} | {form.jump} |"
        )
    return "\n".join(lines)


def _said(ways: Iterable[Way]) -> str:
    """Ways in words."""
    if set(ways) == WAYS:
        return "all"
    return ", ".join(f"{place} streamed" if streamed else place for place, streamed in sorted(ways))


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def main() -> int:
    """Read everything; print the table of what gave the right documents."""
    expected, ran = digest(TEXTS), []
    with tempfile.TemporaryDirectory() as folder:
        for place in PLACES:
            found = list(read(place, Path(folder) / place))
            ran += [one for one, sha256 in found if sha256 == expected]
            wrong = [one for one, sha256 in found if sha256 != expected]
            print(f"{place}: {len(found)} read, {len(wrong)} wrong", *wrong, file=sys.stderr)
    print(table(ran))
    return int(len(ran) != len(WAYS) * len(SHARDS))


if __name__ == "__main__":
    sys.exit(main())
