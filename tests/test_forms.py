"""The same documents out of every form of shard, from every block on, filtered and not."""

from __future__ import annotations

import hashlib
import itertools
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest

from pipeline import filters, holdout
from pipeline.blocks import BlockData, Texts, blocks
from pipeline.codecs import open_documents
from pipeline.config import Filter
from pipeline.encoding import safe_cut
from pipeline.errors import ShardError
from pipeline.messages import BadRecord, BlockStart
from tests import places
from tests.forms import COMPRESSIONS, FORMS, Form, Row
from tests.harness import ROOT, english, job, run
from tests.servers import Behaviour, http_server
from tests.test_pipeline import reference

_RANDOM = random.Random(6)
ROWS: list[Row] = [
    {
        "text": text if number % 13 else "äöü — 語 " + text,
        "id": f"<urn:uuid:{number:032x}>",
        "dump": "CC-MAIN-2024-10" if number < 60 else "CC-MAIN-2024-18",
        "url": f"https://example.com/{number}",
        "date": f"2024-0{1 + number // 20}-20T12:00:00Z",
        "language": _RANDOM.choice(["en", "en", "de", None]),
        "language_score": round(_RANDOM.random(), 3),
        "meta": {"lang": "x", "tags": [f"t{number % 3}", "b"]},
    }
    for number, text in enumerate(english(120, largest=3000))
]  # fmt: skip
ROWS[20]["text"] = "".join(english(30, largest=900))  # larger than a block
TEXTS = [str(row["text"]) for row in ROWS]
BLOCK_BYTES = 9000
CLAIMED = [(form, kind) for form in FORMS for kind in form.compressions]


def write(folder: Path, form: Form, kind: str, rows: list[Row] = ROWS) -> Path:
    path = folder / f"shard.{form.name}.{kind}".rstrip(".")
    path.write_bytes(COMPRESSIONS[kind](form.make(rows)))
    return path


NO_FILTER = Filter()


def read(
    path: Path,
    chosen: Filter = NO_FILTER,
    begin: BlockStart | None = None,
    share: float = 0.0,
    source: BinaryIO | None = None,
) -> list[BlockData]:
    """The blocks of a shard, as a decompressor makes them."""
    condition = filters.condition(chosen)
    documents: Any = open_documents(
        source or str(path),
        path.name,
        "text",
        where=filters.Where(condition) if condition else None,
        begin=begin.entry if begin is not None else None,
    )
    documents = filters.by_length(documents, chosen.min_chars, chosen.max_chars)
    if share:
        documents = holdout.select(documents, share, held_out=False)
    return list(
        blocks(
            documents,
            block_bytes=BLOCK_BYTES,
            max_documents=40,
            cut=safe_cut("gpt2"),
            begin=begin,
        )
    )


def texts(found: list[BlockData]) -> list[str]:
    """The documents that blocks hold."""
    whole: list[bytes] = []
    for block in found:
        raw = b"".join(bytes(piece) for piece in block.pieces)
        ends = itertools.accumulate(block.lengths, initial=0)
        pieces = [raw[start:end] for start, end in itertools.pairwise(ends)]
        if block.continues:
            whole[-1] += pieces.pop(0)
        whole += pieces
    return [one.decode() for one in whole]


def plain(block: BlockData) -> tuple[Any, ...]:
    """All that a block hands over but where the next begins."""
    text = b"".join(bytes(piece) for piece in block.pieces)
    return text, block.lengths, block.continues, block.begins, block.num_bad, block.filtered


def ids(claimed: tuple[Form, str]) -> str:
    return f"{claimed[0].title} {claimed[1]}"


@pytest.mark.parametrize("claimed", CLAIMED, ids=ids)
def test_every_claimed_form_gives_the_same_blocks(
    tmp_path: Path, claimed: tuple[Form, str]
) -> None:
    """And so does reading from any block on, with the entries of this form as close as can be."""
    path = write(tmp_path, *claimed)
    found = read(path)
    assert texts(found) == TEXTS
    with path.open("rb") as file:  # as a shard that is read where it is, without a path
        assert texts(read(path, source=file)) == TEXTS
        assert file.closed
    for number in range(0, len(found), 7):
        begin = found[number].next
        assert begin is not None
        rest = read(path, begin=begin)
        assert [plain(one) for one in rest] == [plain(one) for one in found[number + 1 :]]


@pytest.fixture
def close_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries every few records instead of every 4 MiB."""
    for module in ("lines", "codecs"):
        monkeypatch.setattr(f"pipeline.{module}.ENTRY_BYTES", 2000)
    monkeypatch.setattr("pipeline.compression.CHUNK_BYTES", 4096)


@pytest.mark.usefixtures("close_entries")
@pytest.mark.parametrize("name", ["tar", "jsonl", "txt"])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_reading_begins_at_entries(tmp_path: Path, name: str, kind: str) -> None:
    """From every block, also inside a cut document; what is gone over is less than an entry's."""
    form = next(form for form in FORMS if form.name == name)
    path = write(tmp_path, form, kind)
    chosen = Filter(min_chars=400)
    found = read(path, chosen, share=0.1)
    assert len(found) > 15
    assert any(block.next and block.next.pieces for block in found)
    assert any(block.filtered for block in found)
    for number, block in enumerate(found):
        begin = msgspec.convert(msgspec.to_builtins(block.next), BlockStart)
        assert begin.records < 12 or number == 0
        rest = read(path, chosen, begin, share=0.1)
        assert [plain(one) for one in rest] == [plain(one) for one in found[number + 1 :]]
    assert len({block.next.entry.at for block in found if block.next}) > 5
    if kind == "bz2":
        assert any(block.next.entry.bz2 for block in found if block.next)


FILTERED = Filter(
    min_chars=300,
    max_chars=20_000,
    languages=["en", "de"],
    min_language_score=0.2,
    dumps=["CC-MAIN-2024-10", "CC-MAIN-2024-18"],
    from_date="2024-02",
    before_date="2024-06-01",
    where="not url.startswith('http:') and (meta.lang == 'x' or column('/meta/tags/0') == 't1')",
)


def wanted(row: Row) -> bool:
    """FILTERED in plain Python."""
    return (
        300 <= len(str(row["text"])) <= 20_000
        and row["language"] in ("en", "de")
        and float(str(row["language_score"])) >= 0.2
        and "2024-02" <= str(row["date"]) < "2024-06-01"
    )


@pytest.mark.parametrize("claimed", [one for one in CLAIMED if one[0].columns], ids=ids)
def test_a_filter_leaves_the_same_documents_in_every_form(
    tmp_path: Path, claimed: tuple[Form, str]
) -> None:
    found = read(write(tmp_path, *claimed), FILTERED)
    expected = [str(row["text"]) for row in ROWS if wanted(row)]
    assert 20 < len(expected) < 80
    assert texts(found) == expected
    assert sum(block.filtered for block in found) == len(ROWS) - len(expected)
    assert not any(block.num_bad for block in found)


def test_length_alone_filters_texts_too(tmp_path: Path) -> None:
    form = next(form for form in FORMS if form.name == "txt")
    found = read(write(tmp_path, form, "gz"), Filter(max_chars=500))
    assert texts(found) == [text for text in TEXTS if len(text) <= 500]


@pytest.mark.parametrize("field", ["/a/b/0", "/a/b/1/c~1d", "/messages/0/content", "/~1x"])
@pytest.mark.parametrize("name", ["jsonl", "tar", "parquet", "arrow"])
def test_the_text_may_be_nested(tmp_path: Path, name: str, field: str) -> None:
    """Behind a JSON pointer, in JSON and in tables; a null or a short list on the way is a record
    without text in both, and a pointer that leads nowhere is told."""
    rows: list[Row] = [nested_row(field, text) for text in TEXTS[:30]]
    form = next(form for form in FORMS if form.name == name)
    path = write(tmp_path, form, "", rows)
    found: list[str] = []
    for item in open_documents(str(path), path.name, field):
        if isinstance(item, Texts):
            found += [text.decode() for text in item.one_by_one()]
        elif isinstance(item, bytes):
            found.append(item.decode())
    assert found == TEXTS[:30]
    missing = "/nowhere/at/all"
    if name in ("parquet", "arrow"):
        with pytest.raises(ShardError, match="has no column '/nowhere/at/all'"):
            list(open_documents(str(path), path.name, missing))
    else:
        told = [one for one in open_documents(str(path), path.name, missing)]
        assert {one.reason for one in told if isinstance(one, BadRecord)} == {
            "it has no '/nowhere/at/all'"
        }


def nested_row(field: str, text: str) -> Row:
    """A row that has the text where the pointer leads."""
    if field == "/a/b/0":
        return {"a": {"b": [text, "x"]}}
    if field == "/a/b/1/c~1d":
        return {"a": {"b": [{"c/d": "x"}, {"c/d": text}]}}
    if field == "/messages/0/content":
        return {"messages": [{"role": "user", "content": text}]}
    return {"/x": text, "x": "no"}


@pytest.mark.parametrize("name", ["jsonl", "parquet", "arrow"])
def test_nothing_on_the_way_to_the_text_is_a_bad_record(tmp_path: Path, name: str) -> None:
    rows: list[Row] = [{"a": {"b": ["one"]}}, {"a": None}, {"a": {"b": None}}, {"a": {"b": []}},
                       {"a": {"b": [None]}}, {"a": {"b": ["two"]}}]  # fmt: skip
    form = next(form for form in FORMS if form.name == name)
    path = write(tmp_path, form, "", rows)
    items = list(open_documents(str(path), path.name, "/a/b/0"))
    assert [one for one in items if isinstance(one, bytes)] == [b"one", b"two"]
    assert sum(isinstance(one, BadRecord) for one in items) == 4


@pytest.mark.parametrize("form", [form for form in FORMS if not form.columns], ids=lambda f: f.name)
def test_texts_have_no_columns_to_filter_by(tmp_path: Path, form: Form) -> None:
    path = write(tmp_path, form, "")
    with pytest.raises(ShardError, match=r"has no 'language', which data\.filter names"):
        read(path, Filter(languages=["en"]))
    assert texts(read(path, Filter(where="optional(language) is None"))) == TEXTS
    assert texts(read(path, Filter(where="optional(language) == 'en'"))) == []


# ── out of every place ──────────────────────────────────────────────────────────────────────


@cache
def _ran(place: str) -> tuple[places.Ran, ...]:
    """Every form, read out of a place; those with the right documents."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(places.read(place, Path(folder) / place))
    return tuple(ran for ran, sha256 in found if sha256 == places.digest(places.TEXTS))


@pytest.mark.parametrize("place", places.PLACES)
def test_every_form_out_of_every_place_gives_the_same_documents(place: str) -> None:
    """Fetched and, where that differs, streamed."""
    assert len(_ran(place)) == len(places.SHARDS) * (1 if place == "file" else 2)


def test_the_table_of_the_readme_is_what_ran() -> None:
    ran = [one for place in places.PLACES for one in _ran(place)]
    assert places.table(ran) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_says_what_did_not_run() -> None:
    """So it cannot claim it: one form out of one place is missing."""
    form = FORMS[0]
    ran = [
        places.Ran(place, streamed, one.form.title, one.kind)
        for one in places.SHARDS for place, streamed in places.WAYS
        if (one.form, one.kind, place, streamed) != (form, "xz", "s3", True)
    ]  # fmt: skip
    lines = places.table(ran).splitlines()
    assert sum("| all | all |" in line or "| all | length |" in line for line in lines) == (
        len(FORMS) - 1
    )
    (row,) = [line for line in lines if line.startswith(f"| {form.title} |")]
    assert "http streamed" in row
    assert "s3 streamed" not in row


_END_TO_END = [
    ("file", "parquet", ""), ("http", "jsonl", "xz"), ("file", "tar", "lz4"),
    ("http", "arrow", ""), ("file", "txt", "bz2"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "kind"), _END_TO_END)
def test_the_stream_of_a_run_is_the_same(tmp_path: Path, source: str, name: str, kind: str) -> None:
    form = next(form for form in FORMS if form.name == name)
    (tmp_path / "served").mkdir()
    shard = write(tmp_path / "served", form, kind)
    with http_server(shard.parent, Behaviour()) as url:
        place = shard if source == "file" else f"{url}/{shard.name}"
        summary = run(tmp_path, job(tmp_path, [place], filter={"max_chars": 3000}))
    expected = [text for text in TEXTS if len(text) <= 3000]
    assert summary["sha256"] == hashlib.sha256(reference(expected).tobytes()).hexdigest()
    assert summary["filtered"] == len(TEXTS) - len(expected) > 0
