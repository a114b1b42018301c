"""Which documents are wanted: a condition over their columns, and their length.

Runs in: supervisor (once, to check it), decompressors. Pure.

The condition (pipeline/expressions.py) says the same of a record of JSON and of a row of a table.
Of a table's row groups it is first asked what their statistics allow: those that cannot hold a
wanted row are not read at all. Lengths are in characters (code points) of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import fields
from pipeline.blocks import Documents, Filtered, Item, Texts
from pipeline.config import Filter
from pipeline.errors import ShardError
from pipeline.expressions import Column, Node, Test, kind_of, parse, predicate, tests

_REMEDY = (
    "correct data.filter; optional(column) in data.filter.where is null where there is no such "
    "column"
)


def condition(chosen: Filter) -> str:
    """All of a filter but the lengths, as one condition; empty if there is none.

    Raises:
        ConfigError: a condition that cannot be.
    """
    parts = []
    if chosen.languages:
        parts.append(f"language in {chosen.languages!r}")
    if chosen.min_language_score is not None:
        parts.append(f"language_score >= {chosen.min_language_score!r}")
    if chosen.dumps:
        parts.append(f"dump in {chosen.dumps!r}")
    if chosen.from_date is not None:
        parts.append(f"date >= {chosen.from_date!r}")
    if chosen.before_date is not None:
        parts.append(f"date < {chosen.before_date!r}")
    if chosen.where is not None:
        parse(chosen.where)  # its own text in its own message
        parts.append(f"({chosen.where.strip()})" if parts else chosen.where.strip())
    text = " and ".join(parts)
    if text:
        parse(text)
    return text


class Where:
    """A condition, ready to be asked.

    Args:
        text: As condition gives it.
    """

    def __init__(self, text: str) -> None:
        self.node = parse(text)
        self.tests = tuple(tests(self.node))
        self.columns = tuple(dict.fromkeys(test.column for test in self.tests))
        self._holds = predicate(self.node)

    # ── JSON ────────────────────────────────────────────────────────────────────────────────

    def wants(self, found: Mapping[Column, msgspec.Raw | None]) -> bool:
        """Whether it holds for a record.

        Args:
            found: What stands in each column; None where there is nothing.

        Raises:
            AbsentError: a column that must be there is not.
            KindError: a value is of another kind than it is compared with.
        """
        values: dict[Column, Any] = {}
        for column, raw in found.items():
            if raw is None and not column.optional:
                raise AbsentError(str(column))
            values[column] = None if raw is None else msgspec.json.decode(raw)
        for test in self.tests:
            value = values[test.column]
            if test.values and kind_of(value) not in ("null", kind_of(test.values[0])):
                raise KindError(
                    f"its {str(test.column)!r} is a {kind_of(value)}, which data.filter compares "
                    f"with {test.values[0]!r}"
                )
        return self._holds(values)

    # ── tables ──────────────────────────────────────────────────────────────────────────────

    def check(self, schema: pa.Schema, name: str) -> None:
        """See that a table has the columns, and that they are of the right kinds.

        Raises:
            ShardError: names the shard and the column.
        """
        for test in self.tests:
            kind = fields.type_of(schema, test.column.path)
            if kind is None and not test.column.optional:
                raise absent(name, str(test.column), ", ".join(schema.names))
            if kind is not None and test.values and not _comparable(kind, test):
                raise ShardError(
                    f"{name}: its column {test.column} holds {str(kind)[:100]}, which data.filter "
                    f"compares with {test.values[0]!r}",
                    _REMEDY,
                )

    def mask(self, batch: pa.RecordBatch) -> np.ndarray:
        """For which rows it holds: bool, shape (rows,). The columns are those of check."""
        arrays = {
            column: fields.column(batch, column.path)
            for column in self.columns
            if fields.type_of(batch.schema, column.path) is not None
        }
        return _mask(self.node, lambda test: _rows(test, arrays.get(test.column), len(batch)))

    def statistics(self, schema: pa.Schema) -> pc.Expression | None:
        """A condition that holds wherever this one does, of what statistics can tell; None if
        there is none."""
        return _statistics(self.node, schema)


class AbsentError(Exception):
    """A record lacks a column."""


class KindError(Exception):
    """A record has a value of another kind than it is compared with."""


def absent(where: str, column: str, there: str) -> ShardError:
    """A shard or record lacks a column that the filter names."""
    return ShardError(
        f"{where} has no {column!r}, which data.filter names: it has {there[:300]}", _REMEDY
    )


def _mask(node: Node, rows: Callable[[Test], np.ndarray]) -> np.ndarray:
    if isinstance(node, Test):
        return rows(node)
    masks = [_mask(part, rows) for part in node.parts]
    return np.logical_and.reduce(masks) if node.every else np.logical_or.reduce(masks)


def _comparable(kind: pa.DataType, test: Test) -> bool:
    """Whether values of a type can be compared with a comparison's constants."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    match kind_of(test.values[0]):
        case _ if pa.types.is_null(kind):
            return True
        case "number":
            floating = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
            return floating or pa.types.is_integer(kind)
        case "truth":
            return pa.types.is_boolean(kind)
        case _ if is_time(kind) and test.sign in ("==", "!=", "<", "<=", ">", ">=", "in"):
            return all(_moment(str(value)) is not None for value in test.values)
    return is_text(kind)


def is_time(kind: pa.DataType) -> bool:
    """Whether a column of this type holds dates or times."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a plain column of this type holds texts, or bytes that may be some."""
    return kind in (
        pa.string(), pa.large_string(), pa.string_view(),
        pa.binary(), pa.large_binary(), pa.binary_view(),
    )  # fmt: skip


def _rows(test: Test, array: pa.Array | None, count: int) -> np.ndarray:
    """For which of the values one comparison holds."""
    if array is None or pa.types.is_null(array.type):
        return np.full(count, test.sign == "null" and not test.opposite)
    if pa.types.is_dictionary(array.type):  # each value once: few may be named by many rows
        of_value = np.append(_rows(test, array.dictionary, len(array.dictionary)), False)
        if test.sign == "null":
            of_value[-1] = not test.opposite
        return of_value[pc.fill_null(array.indices.cast(pa.int64()), -1).to_numpy()]
    if test.sign == "null":
        null = pc.is_null(array, nan_is_null=pa.types.is_floating(array.type))
        return _truth(null) != test.opposite
    array, values = _alike(array, test.values)
    valid = _truth(pc.is_valid(array))
    if pa.types.is_floating(array.type):
        valid &= ~_truth(pc.is_nan(array))
    return valid & (_truth(_KERNELS[test.sign](array, values)) != test.opposite)


def _truth(array: pa.Array) -> np.ndarray:
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _piece(values: pa.Array) -> bytes | str:
    value: bytes | str = values[0].as_py()
    return value


_KERNELS: dict[str, Callable[[pa.Array, pa.Array], pa.Array]] = {
    "==": lambda array, values: pc.equal(array, values[0]),
    "!=": lambda array, values: pc.not_equal(array, values[0]),
    "<": lambda array, values: pc.less(array, values[0]),
    "<=": lambda array, values: pc.less_equal(array, values[0]),
    ">": lambda array, values: pc.greater(array, values[0]),
    ">=": lambda array, values: pc.greater_equal(array, values[0]),
    "in": lambda array, values: pc.is_in(array, value_set=values),
    "contains": lambda array, values: pc.match_substring(array, _piece(values)),
    "startswith": lambda array, values: pc.starts_with(array, _piece(values)),
    "endswith": lambda array, values: pc.ends_with(array, _piece(values)),
}


def _alike(array: pa.Array, values: Sequence[Any]) -> tuple[pa.Array, pa.Array]:
    """A column and the constants that it is compared with, as one type."""
    kind = array.type
    if is_text(kind):  # bytes: what is not UTF-8 compares too
        return array.cast(pa.large_binary()), pa.array([v.encode() for v in values], "large_binary")
    if is_time(kind):
        instant = pa.timestamp("us")
        moments = pa.array([_moment(value) for value in values], instant)
        if pa.types.is_timestamp(kind) and kind.tz:
            array = array.cast(pa.timestamp(kind.unit, "UTC"))
        return array.cast(instant, safe=False), moments
    if pa.types.is_boolean(kind):
        return array, pa.array(values)
    if pa.types.is_integer(kind) and all(isinstance(value, int) for value in values):
        try:
            return array, pa.array(values, kind)
        except (pa.ArrowInvalid, OverflowError):  # out of the column's range
            pass
    return array.cast(pa.float64(), safe=False), pa.array([float(v) for v in values])


def _moment(text: str) -> datetime | None:
    """A date or time in ISO's form, as UTC's; without a zone it is that already. None: it is no
    such text."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo is not None else moment


# ── statistics ──────────────────────────────────────────────────────────────────────────────


def _statistics(node: Node, schema: pa.Schema) -> pc.Expression | None:
    if isinstance(node, Test):
        return _statistic(node, schema)
    known = [_statistics(part, schema) for part in node.parts]
    parts = [part for part in known if part is not None]
    if not parts or (not node.every and len(parts) < len(known)):
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part if node.every else whole | part
    return whole


def _statistic(test: Test, schema: pa.Schema) -> pc.Expression | None:
    """One comparison, if the column has a minimum and maximum that are compared as the values."""
    kind = fields.type_of(schema, test.column.path)
    if kind is None or len(test.column.path) > 1 or test.opposite:
        return None
    whole = all(isinstance(value, int) for value in test.values)
    plain = kind in (pa.string(), pa.large_string(), pa.float64(), pa.bool_())
    if not plain and not (pa.types.is_integer(kind) and whole):
        return None
    try:
        values = pa.array(test.values, kind)
    except (pa.ArrowInvalid, OverflowError, pa.ArrowTypeError):  # out of the column's range
        return None
    field = pc.field(test.column.path[0])
    if test.sign == "in":
        return field.isin(values)
    compared = {"==": "equal", "<": "less", "<=": "less_equal", ">": "greater",
                ">=": "greater_equal"}  # fmt: skip
    if test.sign not in compared:
        return None
    return getattr(pc, compared[test.sign])(field, values[0])


# ── length ──────────────────────────────────────────────────────────────────────────────────


def by_length(documents: Iterable[Item], least: int | None, most: int | None) -> Documents:
    """Documents of so many characters; what else comes between them stays.

    Args:
        documents: Of a shard; UTF-8.
        least, most: Characters that a document must and may have; None is no limit.
    """
    low, high = least or 0, float("inf") if most is None else most
    for document in documents:
        match document:
            case bytes():
                yield document if low <= len(document.decode()) <= high else Filtered(1)
            case Texts():
                counts = _characters(document)
                keep = ((counts >= low) & (counts <= high)).tolist()
                for kept, run in document.chosen(keep):
                    yield run if kept else Filtered(len(run.offsets) - 1)
            case _:
                yield document


def _characters(texts: Texts) -> np.ndarray:
    """Code points of every document: the bytes that go on with none."""
    starts, bounds = (texts.text & 0xC0) != 0x80, texts.offsets
    counts = np.zeros(len(bounds) - 1, np.int64)
    filled = np.flatnonzero(np.diff(bounds))
    if len(filled):
        within = starts[bounds[0] : bounds[-1]].view(np.uint8)
        firsts = bounds[filled] - bounds[0]
        counts[filled] = np.add.reduceat(within, firsts, dtype=np.int64)
    return counts
