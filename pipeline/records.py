"""One record of JSON into its text, or into the reason why it has none.

Runs in: decompressors. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from pipeline import fields, filters
from pipeline.blocks import Filtered
from pipeline.messages import BadRecord

_SHOWN_CHARACTERS = 200
_decode_text = msgspec.json.Decoder(str).decode


@dataclass(frozen=True)
class Wanted:
    """What is read of a shard.

    name: the shard's, for messages. text: where the text stands. where: which records. whole: the
    records themselves, not their texts.
    """

    name: str
    text: fields.Path
    where: filters.Where | None = None
    whole: bool = False


class PlainText(bytes):
    """A record that is nothing but its text."""


JsonReader = Callable[[bytes, str], bytes | BadRecord | Filtered]


def json_reader(wanted: Wanted) -> JsonReader:
    """Reads only the text of a JSON object, and what the filter needs; all else in it is skipped.
    Of whole records it gives the object itself, if it has a text.

    Of a key that comes twice the last counts, as in json.loads.

    Returns:
        (data, place) → the text as UTF-8, or what is wrong with the record at that place, or that
        the filter does not want it. It raises a ShardError for a record that lacks a column of
        the filter.
    """
    if wanted.whole:
        of_text = json_reader(replace(wanted, whole=False))

        def keep(data: bytes, place: str) -> bytes | BadRecord | Filtered:
            text = of_text(data, place)
            return data if isinstance(text, bytes) else text

        return keep
    if wanted.where is not None or len(wanted.text) > 1:
        return _Picking(wanted).read
    field = wanted.text[0]
    good = msgspec.defstruct("Good", [("text", str)], rename={"text": field})
    decode_good = msgspec.json.Decoder(good).decode
    look_closer = _Picking(wanted).read

    def read(data: bytes, place: str) -> bytes | BadRecord | Filtered:
        try:
            return cast(bytes, decode_good(data).text.encode())  # type: ignore[attr-defined]
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return look_closer(data, place)

    return read


def text_reader(wanted: Wanted) -> JsonReader:
    """Reads a record that is nothing but its text: of other columns it has none, which a filter
    may allow.

    Returns:
        As json_reader.
    """

    def read(data: bytes, place: str) -> bytes | BadRecord | Filtered:
        if wanted.where is not None:
            try:
                if not wanted.where.wants(dict.fromkeys(wanted.where.columns)):
                    return Filtered(1)
            except filters.AbsentError as error:
                where = f"{wanted.name}, {shown(place)}"
                raise filters.absent(where, str(error), "its text alone") from None
        return PlainText(data) if is_utf8(data) else bad(place, "the text is not UTF-8")

    return read


class _Picking:
    """Picks what is wanted out of a record one by one, and says what is wrong with it."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        columns = wanted.where.columns if wanted.where is not None else ()
        paths = [wanted.text, *(column.path for column in columns)]
        keys = dict.fromkeys(path[0] for path in paths)
        self._attributes = {key: f"value_{number}" for number, key in enumerate(keys)}
        kind = msgspec.Raw | msgspec.UnsetType
        record = msgspec.defstruct(
            "Record",
            [(name, kind, msgspec.UNSET) for name in self._attributes.values()],
            rename={name: key for key, name in self._attributes.items()},
        )
        self._decode = msgspec.json.Decoder(record).decode

    def read(self, data: bytes, place: str) -> bytes | BadRecord | Filtered:
        """See json_reader."""
        wanted = self._wanted
        field = fields.shown(wanted.text)
        try:
            record = self._decode(data)
            if wanted.where is not None:
                found = {one: self._find(record, one.path) for one in wanted.where.columns}
                if not wanted.where.wants(found):
                    return Filtered(1)
            raw = self._find(record, wanted.text)
            if raw is None:
                return bad(place, f"it has no {field!r}")
            return _decode_text(raw).encode()
        except filters.AbsentError as error:
            there = shown(", ".join(msgspec.json.decode(data)))
            raise filters.absent(f"{wanted.name}, {shown(place)}", str(error), there) from None
        except msgspec.ValidationError as error:
            return bad(place, f"{field!r} is no text: {error}")
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return bad(place, f"it is no JSON: {error}")
        except filters.KindError as error:
            return bad(place, str(error))

    def _find(self, record: Any, path: fields.Path) -> msgspec.Raw | None:
        raw = getattr(record, self._attributes[path[0]])
        return None if raw is msgspec.UNSET else fields.below(raw, path[1:])


def is_utf8(data: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def bad(place: str, reason: str) -> BadRecord:
    """A record that is left out; both texts may come from the shard itself."""
    return BadRecord(shown(place), shown(reason))


def shown(text: str) -> str:
    """Foreign text as it may stand in a message: one line, printable, not endless."""
    return "".join(c if c.isprintable() else "·" for c in text[:_SHOWN_CHARACTERS])
