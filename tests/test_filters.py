"""Conditions over columns: one meaning for JSON and for tables, whatever statistics say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import filters, identity
from pipeline.blocks import Filtered, Texts
from pipeline.codecs import open_documents
from pipeline.config import Config, Filter
from pipeline.errors import ConfigError, ShardError
from pipeline.messages import BadRecord
from pipeline.settings import load
from tests.harness import finish, job, run, start

# ── one meaning ─────────────────────────────────────────────────────────────────────────────

_WORDS = st.sampled_from(["", "a", "ab", "b", "é", "zz"])
_ROWS = st.fixed_dictionaries({
    "word": st.none() | _WORDS,
    "count": st.none() | st.integers(-3, 3),
    "score": st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.5]),
    "flag": st.none() | st.booleans(),
})  # fmt: skip
Row = dict[str, Any]
Said = tuple[str, Callable[[Row], bool | None]]  # a condition, and what it says; None: nothing
_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b,
}  # fmt: skip


def _compared(column: str, sign: str, value: Any, turned: bool) -> Said:
    text = f"{value!r} {sign} {column}" if turned else f"{column} {sign} {value!r}"
    compare = _SIGNS[sign]

    def said(row: Row) -> bool | None:
        found = row[column]
        if found is None:
            return None
        return compare(value, found) if turned else compare(found, value)

    return text, said


_COLUMN_AND_VALUE = st.one_of(
    st.tuples(st.just("word"), _WORDS),
    st.tuples(st.sampled_from(["count", "score"]), st.sampled_from([-2, 0, 1, 0.5, 1.5, 10**12])),
)
_TESTS = st.one_of(
    st.builds(lambda pair, sign, turned: _compared(pair[0], sign, pair[1], turned),
              _COLUMN_AND_VALUE, st.sampled_from(sorted(_SIGNS)), st.booleans()),
    st.builds(lambda values: (f"word in {values!r}",
                              lambda r: None if r["word"] is None else r["word"] in values),
              st.lists(_WORDS, min_size=1, max_size=3)),
    st.builds(lambda values: (f"count not in {values!r}",
                              lambda r: None if r["count"] is None else r["count"] not in values),
              st.lists(st.integers(-3, 3), min_size=1, max_size=3)),
    st.builds(lambda piece: (f"{piece!r} in word",
                             lambda r: None if r["word"] is None else piece in r["word"]), _WORDS),
    st.builds(lambda piece: (f"word.startswith({piece!r})",
                             lambda r: None if r["word"] is None else r["word"].startswith(piece)),
              _WORDS),
    st.just(("flag", lambda r: r["flag"])),
    st.just(("score is None", lambda r: r["score"] is None)),
    st.just(("0 <= score < 2", lambda r: None if r["score"] is None else 0 <= r["score"] < 2)),
)  # fmt: skip


def _not(one: Said) -> Said:
    def said(row: Row) -> bool | None:
        inner = one[1](row)
        return None if inner is None else not inner

    return f"not ({one[0]})", said


def _both(every: bool, left: Said, right: Said) -> Said:
    """Kleene's logic: what is unknown decides nothing."""

    def said(row: Row) -> bool | None:
        values = [left[1](row), right[1](row)]
        if (not every) in values:
            return not every
        return None if None in values else every

    return f"({left[0]}) {'and' if every else 'or'} ({right[0]})", said


_CONDITIONS = st.recursive(
    _TESTS, lambda inner: st.builds(_not, inner) | st.builds(_both, st.booleans(), inner, inner),
    max_leaves=6,
)  # fmt: skip
_SCHEMA = pa.schema({
    "text": pa.string(), "word": pa.string(), "count": pa.int32(), "score": pa.float64(),
    "flag": pa.bool_(),
})  # fmt: skip


def _read(path: Path, condition: str) -> tuple[list[str], int]:
    """The texts that a condition leaves, and how many it does not."""
    texts: list[str] = []
    filtered = 0
    for item in open_documents(str(path), path.name, "text", where=filters.Where(condition)):
        assert not isinstance(item, BadRecord), item
        if isinstance(item, Texts):
            texts += [one.decode() for one in item.one_by_one()]
        elif isinstance(item, bytes):
            texts.append(item.decode())
        elif isinstance(item, Filtered):
            filtered += item.number
    return texts, filtered


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(_ROWS, min_size=1, max_size=12), said=_CONDITIONS)
def test_a_condition_says_the_same_of_json_and_of_tables(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], said: Said
) -> None:
    """Against Python's own comparisons and Kleene's logic; row groups of three rows, so that
    statistics can tell something."""
    folder = tmp_path_factory.getbasetemp()
    rows = [{"text": str(number), **row} for number, row in enumerate(rows)]
    expected = [row["text"] for row in rows if said[1](row) is True]
    lines, table = folder / "x.jsonl", pa.Table.from_pylist(rows, _SCHEMA)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(table, folder / "x.parquet", row_group_size=3)
    as_codes = table.set_column(1, "word", table["word"].dictionary_encode())
    with pa.ipc.new_file(folder / "x.arrow", as_codes.schema) as writer:
        writer.write_table(as_codes)
    for name in ("x.jsonl", "x.parquet", "x.arrow"):
        assert _read(folder / name, said[0]) == (expected, len(rows) - len(expected)), name


# ── statistics ──────────────────────────────────────────────────────────────────────────────


class _Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def test_row_groups_that_cannot_match_are_not_read() -> None:
    out = io.BytesIO()
    table = pa.table({"text": [f"{n} " * 400 for n in range(1000)], "n": range(1000)})
    pq.write_table(table, out, row_group_size=50, use_dictionary=False, compression="none")
    found = {}
    for condition in ("n >= 950 and n < 2000", "optional(absent) == 1 or n >= 950"):
        file = _Counting(out.getvalue())
        documents = open_documents(file, "x", "text", where=filters.Where(condition))
        found[condition] = [one for one in documents if isinstance(one, Texts)]
        assert sum(len(texts.offsets) - 1 for texts in found[condition]) == 50
        most = 1 if "absent" in condition else 0.2
        assert file.count < most * len(out.getvalue())


def test_nan_is_null_also_where_statistics_are_silent_about_it(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "x": [0.25, float("nan"), 3.0]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert _read(tmp_path / "x.parquet", "not (x < 1)") == (["c"], 2)
    assert _read(tmp_path / "x.parquet", "x != 7") == (["a", "c"], 1)
    assert _read(tmp_path / "x.parquet", "x is None") == (["b"], 2)


@pytest.mark.parametrize("times", [
    pa.array([datetime(2024, 1, 5, 7), datetime(2024, 2, 1)], pa.timestamp("ns")),
    pa.array([datetime(2024, 1, 5, 7), datetime(2024, 2, 1)], pa.timestamp("ms", "Europe/Paris")),
    pa.array([date(2024, 1, 5), date(2024, 2, 1)], pa.date32()),
    pa.array(["2024-01-05T07:00:00Z", "2024-02-01T00:00:00Z"]),
], ids=["ns", "zone", "date", "text"])  # fmt: skip
def test_dates_are_compared_as_times_or_texts(tmp_path: Path, times: pa.Array) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "date": times}), tmp_path / "x.parquet")
    condition = filters.condition(Filter(from_date="2024-01-31", before_date="2024-03-01"))
    assert _read(tmp_path / "x.parquet", condition) == (["b"], 1)


# ── errors ──────────────────────────────────────────────────────────────────────────────────


def _shards(folder: Path) -> list[Path]:
    row = {"text": "a", "language": "en", "n": 1}
    (folder / "x.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), folder / "x.parquet")
    return [folder / "x.jsonl", folder / "x.parquet"]


@pytest.mark.parametrize("condition", ["langage == 'en'", "language == 'xx' and a.b > 1"])
def test_a_column_that_is_not_there_is_an_error(tmp_path: Path, condition: str) -> None:
    for path in _shards(tmp_path):
        named = r"which data\.filter names: it has text, lang"
        with pytest.raises(ShardError, match=named) as caught:
            _read(path, condition)
        assert path.name in caught.value.what
        assert "optional(column)" in caught.value.remedy


def test_an_optional_column_is_null_where_it_is_not_there(tmp_path: Path) -> None:
    for path in _shards(tmp_path):
        assert _read(path, "optional(stars) > 3 or optional(a.b) is None") == (["a"], 0)
        assert _read(path, "not optional(stars) > 3") == ([], 1)


def test_another_kind_of_value_is_said(tmp_path: Path) -> None:
    lines, table = _shards(tmp_path)
    with pytest.raises(ShardError, match="its column language holds string, which"):
        _read(table, "language > 3")
    where = filters.Where("language > 3")
    (found,) = open_documents(str(lines), "x.jsonl", "text", where=where)
    assert isinstance(found, BadRecord)
    assert found.reason == "its 'language' is a text, which data.filter compares with 3"


@pytest.mark.parametrize("condition", [
    "", "language", "a ==", "a == b", "a = 1", "1 == 2", "a in []", "a in [1, 'x']", "a < None",
    "__import__('os').system('x')", "a + 1 > 2", "a is 3", "f(a)", "a.lower() == 'x'", "a < True",
    "a == 99999999999999999999", "lambda: a", "a == f'{b}'", "(" * 500, "not " * 5000 + "a",
    "a\0 == 1", "a == '\\ud800'", "a == 1; b == 2",
])  # fmt: skip
def test_what_is_no_condition_is_refused(condition: str) -> None:
    if condition == "language":  # a column of True and False
        assert filters.condition(Filter(where=condition)) == "language"
        return
    with pytest.raises(ConfigError, match=r"data\.filter\.where"):
        filters.condition(Filter(where=condition))


def test_lengths_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.filter\.max_chars"):
        load(None, {"name": "x", "data.filter.min_chars": 9, "data.filter.max_chars": 3})


# ── whole runs ──────────────────────────────────────────────────────────────────────────────


def test_filters_are_part_of_what_a_cursor_belongs_to() -> None:
    plain = Config(name="x")
    seen = set()
    for chosen in (Filter(), Filter(min_chars=1), Filter(max_chars=1), Filter(languages=["en"]),
                   Filter(dumps=["d"]), Filter(from_date="2024"), Filter(before_date="2024"),
                   Filter(min_language_score=0.5), Filter(where="a == 1")):  # fmt: skip
        data = msgspec.structs.replace(plain.data, filter=chosen)
        entries = identity.identity(msgspec.structs.replace(plain, data=data), [], 1)
        seen.add(identity.fingerprint(entries))
    assert len(seen) == 9


def test_a_run_counts_what_it_leaves_out_and_names_a_wrong_column(tmp_path: Path) -> None:
    shard = tmp_path / "x.jsonl"
    rows = [{"text": f"text {n}", "n": n} for n in range(500)]
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(tmp_path, job(tmp_path, [shard], filter={"where": "n < 20", "min_chars": 7}))
    assert (summary["documents"], summary["filtered"], summary["bad_records"]) == (10, 490, 0)
    process = start(tmp_path / "b", job(tmp_path / "b", [shard], filter={"languages": ["en"]}))
    outcome, _ = finish(process)
    assert process.returncode == 3
    assert "x.jsonl, line 1 has no 'language', which data.filter names" in outcome["what"]
