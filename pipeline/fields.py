"""Names of columns and fields: a plain name, or a JSON pointer into what is nested.

Runs in: supervisor, decompressors. Pure.

`text` is a field of that name, whatever characters it has. A name that begins with a slash is a
JSON pointer (RFC 6901): `/meta/lang`, `/messages/0/content`. It goes into objects and arrays of
JSON and into structs and lists of tables alike.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

Path = tuple[str, ...]


def parse(name: str) -> Path:
    """The steps of a name."""
    if not name.startswith("/"):
        return (name,)
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in name[1:].split("/"))


def shown(path: Path) -> str:
    """The name again: of one step the plain one."""
    if len(path) == 1 and not path[0].startswith("/"):
        return path[0]
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)


def index(step: str) -> int | None:
    """The number that a step is in a list, if it can be one."""
    return int(step) if step.isascii() and step.isdigit() and len(step) < 10 else None


# ── JSON ────────────────────────────────────────────────────────────────────────────────────

NULL = msgspec.Raw(b"null")
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


@cache
def _decode_step(step: str) -> msgspec.json.Decoder[Any]:
    kind = msgspec.Raw | msgspec.UnsetType
    one = msgspec.defstruct("At", [("value", kind, msgspec.UNSET)], rename={"value": step})
    return msgspec.json.Decoder(one)


def below(raw: msgspec.Raw, steps: Path) -> msgspec.Raw | None:
    """The value that some steps lead to from a JSON value.

    Returns:
        None if an object has no such key, or what should be an object or array is none; null
        below a null, and where an array is too short.

    Raises:
        msgspec.DecodeError: no valid JSON.
    """
    for step in steps:
        first = bytes(memoryview(raw)[:1])
        if first == b"n":
            return NULL
        if first == b"[":
            number, values = index(step), _decode_list(raw)
            if number is None:
                return None
            raw = values[number] if number < len(values) else NULL
        elif first == b"{":
            found = _decode_step(step).decode(raw).value
            if found is msgspec.UNSET:
                return None
            raw = found
        else:
            return None
    return raw


# ── tables ──────────────────────────────────────────────────────────────────────────────────


def type_of(schema: pa.Schema, path: Path) -> pa.DataType | None:
    """The type of a column or of what is nested in it; None if there is no such thing."""
    if schema.get_field_index(path[0]) < 0:  # none, or more than one
        return None
    kind = schema.field(path[0]).type
    for step in path[1:]:
        if pa.types.is_struct(kind):
            if kind.get_field_index(step) < 0:
                return None
            kind = kind.field(step).type
        elif _is_list(kind):
            if index(step) is None:
                return None
            kind = kind.value_type
        else:
            return None
    return kind


def leaf(schema: pa.Schema, path: Path) -> str:
    """As a parquet reader calls it: with dots, up to the first list."""
    kind, names = schema.field(path[0]).type, [path[0]]
    for step in path[1:]:
        if not pa.types.is_struct(kind):
            break
        names.append(step)
        kind = kind.field(step).type
    return ".".join(names)


def column(batch: pa.RecordBatch, path: Path) -> pa.Array:
    """The values that a path of the batch's schema leads to; null below a null, and where a list
    is too short."""
    array = batch.column(path[0])
    for step in path[1:]:
        if pa.types.is_struct(array.type):
            array = pc.struct_field(array, step)
        else:
            array = _element(array, int(step))
    return array


def _is_list(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_one(kind) for is_one in kinds)


def _element(array: pa.Array, number: int) -> pa.Array:
    """An element of each list; pc.list_element refuses lists that are too short."""
    lengths = pc.list_value_length(array)
    long = pc.fill_null(pc.greater(lengths, number), False)
    found = pc.list_element(array.filter(long), number)
    places = pc.if_else(long, pc.subtract(pc.cumulative_sum(long.cast(pa.int64())), 1), None)
    return found.take(places)
