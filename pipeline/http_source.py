"""A shard on an HTTP server: ranges where the server has them, from the start where it has not.

Runs in: supervisor (stat) and fetchers (read). Through the environment's proxy and certificates.

Nothing that a server says is believed unchecked: lengths, ranges and versions must be those of
the catalog, and redirects are followed here, so that credentials never reach another host.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import logging
import re
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import urllib3
from urllib3 import exceptions

from pipeline.errors import SourceError
from pipeline.redaction import redact
from pipeline.sources import ChangedError, Chunks, Stat, TransientError, certificates

logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # its warnings hold whole URLs

_PIECE_BYTES = 1 << 18
_MAX_REDIRECTS = 10
_MAX_SECONDS = 10**9  # no Retry-After is longer; keeps its arithmetic in bounds
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}
_OK, _PARTIAL = 200, 206
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _NO_HEAD = 401, 403, 404, 405
_PRECONDITION, _RANGE, _NOT_IMPLEMENTED = 412, 416, 501
_REMEDIES = {
    _NOT_FOUND: "check the pattern: this shard does not exist",
    _UNAUTHORIZED: "the server wants credentials: put a token or user:password in the URL",
    _FORBIDDEN: "the server refuses: a signed URL may have expired",
}


class _Lines(io.BufferedReader):
    """What a server sends; a line that the connection's end cuts short is an error (http.client
    takes the end for the end of the headers, and those that are missing for none)."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.IncompleteRead(line)
        return line


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = _Lines(self.fp.detach())


class _Connection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


@cache
def _pool(timeout_s: float, proxy: str | None, trusted: Path | None) -> urllib3.PoolManager:
    """One pool per process and proxy. Retries and redirects are ours."""
    settings: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=timeout_s, read=timeout_s),
        "retries": False,
        "ca_certs": trusted and str(trusted),
        "maxsize": 16,
    }
    if proxy:
        user = urllib3.util.parse_url(proxy).auth
        settings["proxy_headers"] = (
            urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(user)) if user else None
        )
    pool = urllib3.ProxyManager(proxy, **settings) if proxy else urllib3.PoolManager(**settings)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return pool


def _proxy(url: str) -> str | None:
    """The environment's proxy for a URL, if it has one: by its scheme, or for all."""
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]  # typeshed lacks it
        parts.netloc, proxies
    ):
        return None
    if not proxy.startswith(("http://", "https://")):
        kind, sign, _ = proxy.partition("://")
        if sign:
            raise SourceError(
                f"the environment's proxy is of the kind {kind}", "give one that speaks http"
            )
        return f"http://{proxy}"
    return proxy


class HttpSource:
    """One http(s) file.

    Args:
        url: May hold user:password, which is sent to this host alone.
        timeout_s: Seconds of silence after which a connection is given up.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        self._url = urllib.parse.urlunsplit(parts._replace(netloc=_host(parts.netloc)))
        self._timeout_s, self._name = timeout_s, redact(url)
        self._credentials: dict[str, str] = {}
        if parts.username is not None:
            user, password = urllib.parse.unquote(parts.username), parts.password or ""
            both = f"{user}:{urllib.parse.unquote(password)}"
            self._credentials = dict(urllib3.make_headers(basic_auth=both))

    def stat(self) -> Stat:
        """See Source."""
        response = self._request("HEAD", {})
        if response.status in (_FORBIDDEN, _NO_HEAD, _NOT_IMPLEMENTED):
            response.close()  # no HEAD here, or a URL signed for GET
            response = self._request("GET", {})
        self._refuse(response)
        stat = Stat(_length(response), self._version(response))
        if response.length_remaining == 0:
            response.drain_conn()  # nothing is left: the connection can serve the next request
        else:
            response.close()
        return stat

    def read(self, start: int, expected: Stat, end: int | None = None) -> Chunks:
        """See Source."""
        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if expected.version.startswith('"'):  # a strong ETag: the server itself compares it
            headers["If-Match"] = expected.version
        response = self._request("GET", headers)
        if response.status == _RANGE:
            response.close()
            if expected.size_bytes is None and _total(response) == start:
                return Chunks(start, iter(()))  # nothing was missing
            raise ChangedError(f"{self._name} is shorter than the {start} bytes that were fetched")
        self._refuse(response)
        begins = _first(response) if response.status == _PARTIAL else 0
        if begins not in (0, start) or begins is None:
            response.close()  # its ranges cannot be relied on
            if start:
                return self.read(0, expected)
            raise TransientError(f"{self._name}: only a part of it is sent")
        try:
            self._check(response, expected)
        except BaseException:
            response.close()
            raise
        return Chunks(begins, self._pieces(response))

    # ── requests ────────────────────────────────────────────────────────────────────────────

    def _request(self, method: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer, redirects followed; its body has yet to be read."""
        url, sent = self._url, self._credentials
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._open(method, url, headers | sent)
            target = response.get_redirect_location()
            if not target:
                return response
            self._passed(response)
            response.close()
            before, url = url, self._join(url, target)
            if _origin(before) != _origin(url):
                sent = {}
        raise SourceError(
            f"{self._name}: more than {_MAX_REDIRECTS} redirects", "check the address"
        )

    def _join(self, url: str, target: str) -> str:
        """The address of a redirect. Raises: SourceError."""
        try:
            joined = urllib.parse.urlsplit(urllib.parse.urljoin(url, target))
            if joined.scheme in ("http", "https") and joined.hostname and joined.port != 0:
                return urllib.parse.urlunsplit(joined._replace(netloc=_host(joined.netloc)))
        except ValueError:
            pass
        raise SourceError(
            f"{self._name}: it redirects to what is no http address", "check the address"
        )

    def _open(self, method: str, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "fineweb-pipeline", **headers}
        try:
            return _pool(self._timeout_s, _proxy(url), certificates()).request(
                method, url, headers=headers, preload_content=False, redirect=False
            )
        except exceptions.LocationValueError:
            raise SourceError(f"{self._name}: this is no address", "check the pattern") from None
        except exceptions.HTTPError as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> TransientError | SourceError:
        """What went wrong, without the address that urllib3 puts into its messages."""
        if _untrusted(error):
            return SourceError(
                f"{self._name}: its certificate is not trusted",
                "set SSL_CERT_FILE to your authority's certificate if the server is yours",
            )
        match error:
            case exceptions.NameResolutionError():
                return TransientError(
                    f"{self._name}: its host's name is not known",
                    remedy="check the name and the network; the same command resumes",
                )
            case exceptions.NewConnectionError():
                said = "no connection"
            case exceptions.TimeoutError():
                said = f"no answer for {self._timeout_s:g} s"
            case exceptions.ProxyError():
                said = "no connection to the proxy"
            case exceptions.ProtocolError():
                said = "the connection broke"
            case _:
                said = type(error).__name__
        return TransientError(f"{self._name}: {said}")

    def _passed(self, response: urllib3.BaseHTTPResponse) -> None:
        """A redirect is about to be followed."""

    # ── answers ─────────────────────────────────────────────────────────────────────────────

    def _refuse(self, response: urllib3.BaseHTTPResponse) -> None:
        """Raise what the status means, if it is no success."""
        status = response.status
        said = response.headers.get("Content-Length")
        if status in (_OK, _PARTIAL) and (said is None or _NUMBER.fullmatch(said)):
            return
        response.close()
        if status in (_OK, _PARTIAL):
            raise TransientError(f"{self._name}: the length that its server says is none")
        if status == _PRECONDITION:
            raise ChangedError(f"{self._name} is another version now")
        if status in RETRY_STATUS:
            raise TransientError(f"{self._name}: HTTP {status}", retry_after_s(response.headers))
        raise SourceError(
            f"{self._name}: HTTP {status}", _REMEDIES.get(status, "check the address")
        )

    def _version(self, response: urllib3.BaseHTTPResponse) -> str:
        """What the server says that tells this version of the file from others."""
        return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""

    def _check(self, response: urllib3.BaseHTTPResponse, expected: Stat) -> None:
        """Compare an answer with the catalog. Raises: ChangedError."""
        if expected.version and self._version(response) != expected.version:
            raise ChangedError(f"{self._name} is another version now")
        total = _total(response) if response.status == _PARTIAL else _length(response)
        if None not in (total, expected.size_bytes) and total != expected.size_bytes:
            was = f"and {expected.size_bytes} when the run began"
            raise ChangedError(f"{self._name} is {total} bytes long now, {was}")

    def _pieces(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            while piece := response.read1(_PIECE_BYTES, decode_content=False):
                yield piece
        except exceptions.HTTPError as error:
            raise self._failed(error) from None
        finally:
            response.close()


def _host(netloc: str) -> str:
    """Without user and password."""
    return netloc.rsplit("@", 1)[-1]


def _origin(url: str) -> tuple[str, str | None, int]:
    """Whom credentials are for: scheme, host and port."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused: other TLS errors may pass."""
    return isinstance(error, ssl.SSLCertVerificationError) or any(
        _untrusted(arg) for arg in error.args if isinstance(arg, Exception)
    )


# ── headers ─────────────────────────────────────────────────────────────────────────────────

_RANGE_FORM = re.compile(r"bytes\s+(?:(\d{1,18})-\d{1,18}|\*)/(?:(\d{1,18})|\*)", re.ASCII)
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,18})", re.ASCII)


def _length(response: urllib3.BaseHTTPResponse) -> int | None:
    """The body's length in bytes, if it is said."""
    length = response.headers.get("Content-Length")
    if length is None or "chunked" in response.headers.get("Transfer-Encoding", "").lower():
        return None
    return int(length)


def _first(response: urllib3.BaseHTTPResponse) -> int | None:
    """Where the range begins that the server sends, if it says so."""
    form = _RANGE_FORM.fullmatch(response.headers.get("Content-Range", ""))
    return int(form[1]) if form and form[1] else None


def _total(response: urllib3.BaseHTTPResponse) -> int | None:
    """The whole file's length, if a partial answer says it."""
    form = _RANGE_FORM.fullmatch(response.headers.get("Content-Range", ""))
    return int(form[2]) if form and form[2] else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait for: it gives them, or a date, or says when it will
    have room again (draft-ietf-httpapi-ratelimit-headers, as the hub does)."""
    value = headers.get("Retry-After", "")
    limit = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    if limit and not value:
        return float(min(int(limit[1]), _MAX_SECONDS))
    if _NUMBER.fullmatch(value):
        return float(min(int(value), _MAX_SECONDS))
    try:
        when = email.utils.parsedate_to_datetime(value)
        now = datetime.now(when.tzinfo and UTC)
        return min(max(0.0, (when - now).total_seconds()), _MAX_SECONDS)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None
