"""A shard in an S3 bucket, through obstore: endpoint and credentials from the usual AWS variables.

Runs in: supervisor (stat) and fetchers (read).
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import obstore
from obstore import exceptions
from obstore.store import S3Store

from pipeline.errors import SourceError
from pipeline.redaction import redact
from pipeline.sources import ChangedError, Chunks, Stat, TransientError

_KEYS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if they are temporary, AWS_SESSION_TOKEN"
_REGION = "set AWS_REGION to the bucket's region"
_DENIED = f"set {_KEYS}; or AWS_SKIP_SIGNATURE=true for a public bucket"
_EXPIRED = f"get new credentials ({_KEYS}); the same command resumes"
# What an answer's <Code> means to a user.
_REMEDIES = {
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "InvalidAccessKeyId": f"the server does not know this key: check {_KEYS}",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "set this machine's clock",
    "NoSuchBucket": "check the bucket's name",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")


class S3Source:
    """One S3 object.

    Args:
        url: s3://bucket/key.
        timeout_s: Seconds of silence after which a connection is given up.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        self._name, self._key = redact(url), parts.path.lstrip("/")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        options: dict[str, Any] = {
            "connect_timeout": f"{timeout_s}s",
            "read_timeout": f"{timeout_s}s",
            "timeout": "24h",
            "allow_http": endpoint.startswith("http://"),
        }
        settings: dict[str, Any] = {}
        if endpoint:
            settings["endpoint"] = endpoint
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            settings["region"] = "us-east-1"
        self._store = S3Store(
            parts.netloc, client_options=options, retry_config={"max_retries": 0}, **settings
        )

    def stat(self) -> Stat:
        """See Source."""
        try:
            meta = obstore.head(self._store, self._key)
        except Exception as error:
            if _status(error) not in (400, 401, 403):
                raise self._translate(error) from None
            meta = self._get({}).meta  # it may be allowed, and its answer says what is wrong
        return Stat(int(meta["size"]), meta["e_tag"] or str(meta["last_modified"]))

    def read(self, start: int, expected: Stat) -> Chunks:
        """See Source."""
        options: dict[str, Any] = {"range": {"offset": start}} if start else {}
        if expected.version.startswith('"'):
            options["if_match"] = expected.version
        answer = self._get(options)
        if expected.size_bytes not in (None, answer.meta["size"]):
            raise ChangedError(f"{self._name} is {answer.meta['size']} bytes long now")
        return Chunks(start, self._pieces(answer))

    def _get(self, options: dict[str, Any]) -> Any:
        try:
            return obstore.get(self._store, self._key, options=options)
        except Exception as error:
            raise self._translate(error) from None

    def _pieces(self, answer: Any) -> Iterator[bytes]:
        try:
            for piece in answer.stream(min_chunk_size=1):
                yield bytes(piece)
        except Exception as error:
            raise self._translate(error) from None

    def _translate(self, error: Exception) -> Exception:
        """One of our three kinds; obstore's own text may hold the request."""
        if isinstance(error, exceptions.PreconditionError):
            return ChangedError(f"{self._name} is another version now")
        text, status = str(error), _status(error)
        code = found[1] if (found := _CODE.search(text)) else ""
        if code in _REMEDIES:
            return SourceError(f"{self._name}: {code}", _REMEDIES[code])
        if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
            return SourceError(f"{self._name} does not exist", "check the bucket and the pattern")
        if status == 416:
            return ChangedError(f"{self._name} is shorter than it was")
        if status in (400, 401, 403) or (status is None and "credential" in text.lower()):
            return SourceError(f"{self._name}: access denied {code}".rstrip(), _DENIED)
        if "redirect" in text.lower():
            return SourceError(f"{self._name}: its bucket is elsewhere", _REGION)
        said = f"HTTP {status} {code}".rstrip() if status else "the connection broke"
        return TransientError(f"{self._name}: {said}")


def _status(error: Exception) -> int | None:
    """The HTTP status that obstore puts into its messages."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None
