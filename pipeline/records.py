"""One record into its text, or into the reason why it has none.

Runs in: decompressors. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec

from pipeline.messages import BadRecord

_SHOWN_CHARACTERS = 200
_decode_text = msgspec.json.Decoder(str).decode


def json_reader(field: str) -> Callable[[bytes, str], bytes | BadRecord]:
    """Reads only the text of a JSON object; all else in it is skipped.

    Args:
        field: Where the text is. Of a key that comes twice the last counts, as in json.loads.

    Returns:
        (data, place) → the text as UTF-8, or what is wrong with the record at that place.
    """
    good = msgspec.defstruct("Good", [("text", str)], rename={"text": field})
    record = msgspec.defstruct(
        "Record", [("text", msgspec.Raw | msgspec.UnsetType, msgspec.UNSET)], rename={"text": field}
    )
    decode_good = msgspec.json.Decoder(good).decode
    decode = msgspec.json.Decoder(record).decode

    def read(data: bytes, place: str) -> bytes | BadRecord:
        try:
            return cast(bytes, decode_good(data).text.encode())  # type: ignore[attr-defined]
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return look_closer(data, place)

    def look_closer(data: bytes, place: str) -> bytes | BadRecord:
        """Of a key that comes twice only the last value counts, and what is wrong is said."""
        try:
            raw = decode(data).text  # type: ignore[attr-defined]
            if raw is msgspec.UNSET:
                return bad(place, f"it has no {field!r}")
            return cast(str, _decode_text(raw)).encode()
        except msgspec.ValidationError as error:
            return bad(place, f"{field!r} is no text: {error}")
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return bad(place, f"it is no JSON: {error}")

    return read


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
