"""Shards in object stores: S3 and what speaks like it, Google Cloud Storage, Azure, by obstore.

Runs in: supervisor (list, stat) and fetchers (read).

Endpoints and credentials come from each store's usual variables; without them from the machine's
own account, where it has one. Proxies and certificates are those of the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from pipeline.errors import SourceError
from pipeline.redaction import redact
from pipeline.sources import ChangedError, Chunks, Listed, Stat, TransientError, certificates

if TYPE_CHECKING:
    from obstore import GetOptions

_VARIABLES = re.compile(r"(AWS|GOOGLE|AZURE|AZURITE)_|(HTTPS?|NO|ALL)_PROXY|_FILE$|_BUNDLE$", re.I)


class _Kind(NamedTuple):
    """What one kind of store is called, and what its users are told."""

    store: type[Any]
    endpoints: tuple[str, ...]  # variables that may name one
    keys: str  # variables of the credentials
    public: str  # for a bucket that needs none
    word: str = "bucket"


_KINDS = {
    "s3": _Kind(
        S3Store,
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if they are temporary, AWS_SESSION_TOKEN",
        "AWS_SKIP_SIGNATURE=true",
    ),
    "gs": _Kind(
        GCSStore,
        ("GOOGLE_BASE_URL",),
        "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SKIP_SIGNATURE=true",
    ),
    "az": _Kind(
        AzureStore,
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
        "AZURE_SKIP_SIGNATURE=true",
        "container",
    ),
}
SCHEMES = tuple(_KINDS)

_REGION = "set AWS_REGION to the bucket's region"
# What an answer's <Code> means to a user; {keys}: the store's variables.
_REMEDIES = {
    "ExpiredToken": "get new credentials ({keys}); the same command resumes",
    "TokenRefreshRequired": "get new credentials ({keys}); the same command resumes",
    "InvalidToken": "get new credentials ({keys}); the same command resumes",
    "InvalidAccessKeyId": "the server does not know this key: check {keys}",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "AuthenticationFailed": "check {keys}",
    "RequestTimeTooSkewed": "set this machine's clock",
    "NoSuchBucket": "there is no such {word}: check its name",
    "ContainerNotFound": "there is no such {word}: check its name",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_NO_CREDENTIALS = re.compile(r"credential|metadata|account (must be|key)|bearer token", re.I)


def split(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and key; a key may hold any character, and is never quoted."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def _store(scheme: str, bucket: str, timeout_s: float) -> Any:
    """The store of a bucket: one per process, so that its connections are used again."""
    variables = tuple(sorted(one for one in os.environ.items() if _VARIABLES.search(one[0])))
    return _make_store(scheme, bucket, timeout_s, variables)


@lru_cache(maxsize=32)
def _make_store(
    scheme: str, bucket: str, timeout_s: float, variables: tuple[tuple[str, str], ...]
) -> Any:
    kind, environment = _KINDS[scheme], dict(variables)
    endpoint = next((environment[name] for name in kind.endpoints if environment.get(name)), "")
    options: dict[str, Any] = {
        "connect_timeout": f"{timeout_s}s",
        "read_timeout": f"{timeout_s}s",
        "timeout": "24h",
        "allow_http": endpoint.startswith("http://"),
    }
    if trusted := certificates():
        options["root_certificate"] = trusted.read_bytes()
    settings: dict[str, Any] = {}
    if endpoint:
        settings["base_url" if scheme == "gs" else "endpoint"] = endpoint
    if scheme == "s3" and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environment.keys():
        settings["region"] = "us-east-1"
    retries: dict[str, Any] = {"max_retries": 0}
    return kind.store(bucket, client_options=options, retry_config=retries, **settings)


class StoreSource:
    """One object.

    Args:
        url: s3://bucket/key, gs://bucket/key or az://container/key.
        timeout_s: Seconds of silence after which a connection is given up.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        scheme, bucket, self._key = split(url)
        self._name, self._kind = redact(url), _KINDS[scheme]
        try:
            self._store = _store(scheme, bucket, timeout_s)
        except Exception as error:
            raise _translate(error, self._name, self._kind) from None

    def stat(self) -> Stat:
        """See Source."""
        try:
            meta = obstore.head(self._store, self._key)
        except Exception as error:
            if _status(error) not in (400, 401, 403, 404) and not _missing(error):
                raise _translate(error, self._name, self._kind) from None
            meta = self._get({}).meta  # it may be allowed, and its answer says what is wrong
        return _stat(meta)

    def read(self, start: int, expected: Stat, end: int | None = None) -> Chunks:
        """See Source."""
        options: dict[str, Any] = {"range": {"offset": start}} if start else {}
        if end is not None:
            options["range"] = (start, end)
        if expected.version.startswith('"'):
            options["if_match"] = expected.version
        answer = self._get(options)
        if expected.size_bytes not in (None, answer.meta["size"]):
            raise ChangedError(f"{self._name} is {answer.meta['size']} bytes long now")
        return Chunks(start, self._pieces(answer))

    def _get(self, options: dict[str, Any]) -> Any:
        try:
            return obstore.get(self._store, self._key, options=cast("GetOptions", options))
        except Exception as error:
            raise _translate(error, self._name, self._kind) from None

    def _pieces(self, answer: Any) -> Iterator[bytes]:
        try:
            for piece in answer.stream(min_chunk_size=1):
                yield bytes(piece)
        except Exception as error:
            raise _translate(error, self._name, self._kind) from None


def list_objects(url: str, timeout_s: float) -> Iterator[Listed]:
    """Everything below a folder of a store, in no certain order.

    Args:
        url: s3://bucket/folder/, and so on.
        timeout_s: Seconds of silence after which a connection is given up.

    Raises:
        TransientError, SourceError: see Source.
    """
    scheme, bucket, prefix = split(url)
    kind = _KINDS[scheme]
    try:
        for objects in obstore.list(_store(scheme, bucket, timeout_s), prefix or None):
            for meta in objects:
                yield Listed(f"{scheme}://{bucket}/{meta['path']}", _stat(meta))
    except Exception as error:
        raise _translate(error, redact(url), kind) from None


def _stat(meta: Any) -> Stat:
    """Azure's listings leave out the quotes of the ETag, which its objects have."""
    tag = meta["e_tag"]
    if tag and not tag.endswith('"'):
        tag = f'"{tag}"'
    return Stat(int(meta["size"]), tag or str(meta["last_modified"]))


# ── errors ──────────────────────────────────────────────────────────────────────────────────


def _translate(error: Exception, name: str, kind: _Kind) -> Exception:
    """One of our three kinds; obstore's own text may hold the request."""
    if isinstance(error, exceptions.PreconditionError):
        return ChangedError(f"{name} is another version now")
    text, status = str(error).partition("\nDebug source")[0], _status(error)
    code = found[1] if (found := _CODE.search(text)) else ""
    if code in _REMEDIES:
        remedy = _REMEDIES[code].format(keys=kind.keys, word=kind.word)
        return SourceError(f"{name}: {code}", remedy)
    if _missing(error):
        return SourceError(f"{name} does not exist", f"check the {kind.word} and the pattern")
    if status == 416:
        return ChangedError(f"{name} is shorter than it was")
    if status in (400, 401, 403) or (status is None and _NO_CREDENTIALS.search(text)):
        remedy = f"set {kind.keys}; or {kind.public} for a public {kind.word}"
        return SourceError(f"{name}: access denied {code}".rstrip(), remedy)
    if "redirect" in text.lower():
        return SourceError(f"{name}: its bucket is elsewhere", _REGION)
    if "InvalidCertificate(" in str(error):  # it stands in the debug source alone
        return SourceError(
            f"{name}: its certificate is not trusted",
            "set SSL_CERT_FILE to your authority's certificate if the server is yours",
        )
    said = f"HTTP {status} {code}".rstrip() if status else "the connection broke"
    return TransientError(f"{name}: {said}")


def _missing(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError | exceptions.NotFoundError)


def _status(error: Exception) -> int | None:
    """The HTTP status that obstore puts into its messages."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None
