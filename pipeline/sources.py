"""Where shards come from: http(s), s3 and this disk, behind one small interface.

Runs in: supervisor (stat) and fetchers (read).

Errors are of three kinds: TransientError (try again, later if the server says so), ChangedError
(the remote file is another one now) and SourceError (trying again does not help). None of them,
nor any log line, holds the secret parts of a URL.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import urllib3

from pipeline.errors import SourceError

CHUNK_BYTES = 1 << 20
_MAX_REDIRECTS = 10
_RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_NOT_FOUND, _UNAUTHORIZED, _FORBIDDEN, _RANGE = 404, 401, 403, 416
_OK, _PARTIAL, _FAILED_PRECONDITION = 200, 206, 412


class TransientError(Exception):
    """Worth another attempt.

    Args:
        what: What happened, with nothing secret.
        retry_after_s: The server's own word on when, if it gave one.
    """

    def __init__(self, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class ChangedError(Exception):
    """The remote file is not the version that was asked for."""


class Stat(NamedTuple):
    """What a source says of a file before it is read."""

    size_bytes: int | None
    version: str  # ETag, or modification time; '' if there is neither


class Chunks(NamedTuple):
    """A body that is being read: it begins at start, which is 0 where ranges are not served."""

    start: int
    data: Iterator[bytes]


class Source(Protocol):
    """One remote file."""

    def stat(self) -> Stat:
        """Size and version. Raises: TransientError, SourceError."""
        ...

    def read(self, start: int, version: str) -> Chunks:
        """The body from byte start on. Raises, also while it is read: TransientError,
        ChangedError, SourceError."""
        ...


def redact(url: str) -> str:
    """The URL without user, password, query and fragment: what may be shown and stored."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def open_source(url: str, options: dict[str, Any]) -> Source:
    """The source of a URL.

    Args:
        url: http, https, s3 or file.
        options: timeout_s, seconds of silence after which a connection is given up.

    Raises:
        SourceError: there is no such kind of source.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    match scheme:
        case "http" | "https":
            return _Http(url, float(options["timeout_s"]))
        case "s3":
            return _S3(url, float(options["timeout_s"]))
        case "file":
            return _LocalFile(url)
    raise SourceError(
        f"{redact(url)}: shards cannot come from {scheme or 'this kind of address'!r}",
        "give http://, https://, s3:// or a path",
    )


# ── http ────────────────────────────────────────────────────────────────────────────────────

_pools: dict[float, urllib3.PoolManager] = {}


def _pool(timeout_s: float) -> urllib3.PoolManager:
    """One pool per process: through the environment's proxy and certificates, if it has any."""
    if timeout_s not in _pools:
        environment = {key.lower(): value for key, value in os.environ.items()}
        proxy = environment.get("https_proxy") or environment.get("http_proxy")
        settings: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=timeout_s, read=timeout_s),
            "retries": urllib3.Retry(0, redirect=_MAX_REDIRECTS, raise_on_status=False),
            "ca_certs": os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE"),
            "maxsize": 16,
        }
        _pools[timeout_s] = (
            urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
        )
    return _pools[timeout_s]


class _Http:
    """An http(s) file: ranges where the server has them, from the start where it has not."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s, self._name = url, timeout_s, redact(url)

    def _request(self, method: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "fineweb-pipeline", **headers}
        parts = urllib.parse.urlsplit(self._url)
        if parts.username is not None:
            user = f"{urllib.parse.unquote(parts.username)}:"
            user += urllib.parse.unquote(parts.password or "")
            headers |= urllib3.make_headers(basic_auth=user)
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1]))
        pool: urllib3.PoolManager = _pool(self._timeout_s)
        if isinstance(pool, urllib3.ProxyManager) and _bypasses_proxy(parts.hostname or ""):
            pool = urllib3.PoolManager(**pool.connection_pool_kw)
        try:
            return pool.request(method, url, headers=headers, preload_content=False)
        except urllib3.exceptions.SSLError as error:
            raise self._certificate(error) from error
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.SSLError):
                raise self._certificate(error.reason) from error
            if isinstance(error.reason, urllib3.exceptions.ResponseError):
                raise SourceError(
                    f"{self._name}: more than {_MAX_REDIRECTS} redirects", "check the address"
                ) from error
            raise TransientError(f"{self._name}: {_cause(error)}") from None
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(f"{self._name}: {_cause(error)}") from None

    def _certificate(self, error: Exception) -> SourceError:
        return SourceError(
            f"{self._name}: its certificate is not trusted ({type(error).__name__})",
            "set SSL_CERT_FILE to your authority's certificate if the server is yours",
        )

    def _refuse(self, response: urllib3.BaseHTTPResponse) -> None:
        """Raise what the status means, if it is no success."""
        status = response.status
        if status in (_OK, _PARTIAL):
            return
        response.close()
        if status == _FAILED_PRECONDITION:
            raise ChangedError(f"{self._name} is another version now")
        if status in _RETRY_STATUS:
            raise TransientError(f"{self._name}: HTTP {status}", _retry_after(response))
        remedy = {
            _NOT_FOUND: "check the pattern: this shard does not exist",
            _UNAUTHORIZED: "the server wants credentials: put a token or user:password in the URL",
            _FORBIDDEN: "the server refuses: a signed URL may have expired",
        }.get(status, "check the address")
        raise SourceError(f"{self._name}: HTTP {status}", remedy)

    def stat(self) -> Stat:
        response = self._request("HEAD", {})
        if response.status in (_FORBIDDEN, 405, 501):  # no HEAD here, or a URL signed for GET
            response.close()
            response = self._request("GET", {})
        self._refuse(response)
        stat = Stat(_length(response), _version(response))
        if response.length_remaining == 0:
            response.drain_conn()  # nothing is left: the connection can serve the next request
        else:
            response.close()
        return stat

    def read(self, start: int, version: str) -> Chunks:
        headers = {"Range": f"bytes={start}-"} if start else {}
        if version.startswith('"'):  # a strong ETag: the server itself compares it
            headers["If-Match"] = version
        response = self._request("GET", headers)
        if response.status == _RANGE:
            response.close()
            raise ChangedError(f"{self._name} is shorter than the {start} bytes that were fetched")
        self._refuse(response)
        if version and _version(response) != version:
            response.close()
            raise ChangedError(f"{self._name} is another version now")
        begins = start if response.status == _PARTIAL else 0
        return Chunks(begins, self._chunks(response))

    def _chunks(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            yield from response.stream(CHUNK_BYTES, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(f"{self._name}: {_cause(error)}") from None
        finally:
            response.close()


def _bypasses_proxy(host: str) -> bool:
    import urllib.request

    return bool(urllib.request.proxy_bypass_environment(host))


def _cause(error: Exception) -> str:
    """What went wrong, without the address that urllib3 puts into its messages."""
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    if length is None or "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return None
    return int(length)


def _version(response: urllib3.BaseHTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After")
    return float(value) if value is not None and value.isdigit() else None


# ── s3 ──────────────────────────────────────────────────────────────────────────────────────


class _S3:
    """An S3 object through obstore: endpoint and credentials from the usual AWS variables."""

    def __init__(self, url: str, timeout_s: float) -> None:
        from obstore.store import S3Store

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

    def _translate(self, error: Exception) -> Exception:
        """One of our three kinds; obstore's own text may hold the request."""
        from obstore import exceptions

        if isinstance(error, FileNotFoundError | exceptions.NotFoundError):
            return SourceError(f"{self._name} does not exist", "check the bucket and the pattern")
        if isinstance(error, exceptions.PreconditionError):
            return ChangedError(f"{self._name} is another version now")
        text = str(error).lower()
        denied = isinstance(
            error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError
        )
        if denied or "403" in text or "401" in text or "credential" in text:
            return SourceError(
                f"{self._name}: access denied",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or "
                "AWS_SKIP_SIGNATURE=true for a public bucket",
            )
        return TransientError(f"{self._name}: {type(error).__name__}")

    def stat(self) -> Stat:
        import obstore

        try:
            meta = obstore.head(self._store, self._key)
        except Exception as error:
            raise self._translate(error) from None
        return Stat(int(meta["size"]), meta["e_tag"] or str(meta["last_modified"]))

    def read(self, start: int, version: str) -> Chunks:
        import obstore

        options: dict[str, Any] = {"range": {"offset": start}} if start else {}
        if version.startswith('"'):
            options["if_match"] = version
        try:
            answer = obstore.get(self._store, self._key, options=options)
        except Exception as error:
            raise self._translate(error) from None
        return Chunks(start, self._chunks(answer))

    def _chunks(self, answer: Any) -> Iterator[bytes]:
        try:
            for chunk in answer.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except Exception as error:
            raise self._translate(error) from None


# ── this disk ───────────────────────────────────────────────────────────────────────────────


class _LocalFile:
    """A file of this machine. It is read in place; nothing is fetched."""

    def __init__(self, url: str) -> None:
        self._path = Path(local_path(url) or "")

    def stat(self) -> Stat:
        try:
            found = self._path.stat()
        except OSError as error:
            raise SourceError(
                f"{self._path}: {error.strerror}", "check the path of the shard"
            ) from error
        return Stat(found.st_size, f"mtime {found.st_mtime_ns}")

    def read(self, start: int, version: str) -> Chunks:
        file = self._path.open("rb")
        file.seek(start)
        return Chunks(start, iter(lambda: file.read(CHUNK_BYTES), b""))


def local_path(url: str) -> str | None:
    """The path of a file URL, or None."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.unquote(parts.path) if parts.scheme == "file" else None
