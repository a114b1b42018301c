"""What must not be shown: credentials in URLs and in the environment.

Runs in: every process. Three lines of defence: a shard is known by its redacted name alone; URLs
in any text lose their user and query; and the values themselves, once hidden, are replaced
wherever they turn up.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterable
from typing import Any

_QUERY = re.compile(r"(\w+://)(?:[^\s/@]*@)?([^\s?#\"']*)[?#][^\s\"']*")
_USER = re.compile(r"(\w+://)[^\s/@]*@")
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|CREDENTIAL|_KEY|_SAS|(?<!NO_)PROXY", re.IGNORECASE
)
_OURS = "FINEWEB_"  # settings: FINEWEB_DATA_TOKENIZER_NAME is no secret
_MIN_LENGTH = 6  # a shorter value may be part of any word
_MASK = "•••"
_hidden: tuple[str, ...] = ()  # the longest first


def redact(url: str) -> str:
    """The URL without user, password, query and fragment: what may be shown and stored."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def hide(urls: Iterable[str] = ()) -> None:
    """Remember the secrets of these URLs and of the environment, for scrub in this process."""
    global _hidden  # noqa: PLW0603 - one set per process, so that no text can miss it
    secret = [
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and not name.startswith(_OURS)
    ]
    values = [value for value in secret if "://" not in value]
    for url in (*urls, *(value for value in secret if "://" in value)):
        values += _secrets(url)
    both = {*values, *map(urllib.parse.unquote_plus, values), *_hidden}
    long_enough = (value for value in both if len(value) >= _MIN_LENGTH)
    _hidden = tuple(sorted(long_enough, key=len, reverse=True))


def hide_value(value: str) -> None:
    """Remember one secret that stands in no URL and no variable."""
    global _hidden  # noqa: PLW0603 - see hide
    if value not in _hidden:
        _hidden = tuple(sorted((value, *_hidden), key=len, reverse=True))


def _secrets(url: str) -> list[str]:
    """What must not be shown of a URL. A value of its query that its path shows as well is none."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # no address: the catalog says so
        return []
    user = [parts.username or "", parts.password or ""] if "@" in parts.netloc else []
    of_query = [pair.partition("=")[2] for pair in parts.query.split("&")]
    return [*user, *(value for value in of_query if value not in parts.path)]


def scrub(text: str) -> str:
    """The text without the users and queries of its URLs and without any hidden value."""
    text = _USER.sub(r"\1", _QUERY.sub(r"\1\2", text))
    for value in _hidden:
        text = text.replace(value, _MASK)
    return text


def scrub_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The same for everything in an event."""
    return {key: _scrub_value(value) for key, value in fields.items()}


def _scrub_value(value: Any) -> Any:
    match value:
        case str():
            return scrub(value)
        case dict():
            return {key: _scrub_value(one) for key, one in value.items()}
        case list() | tuple():
            return [_scrub_value(one) for one in value]
    return value
