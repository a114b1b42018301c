"""A shard on the Hugging Face hub or a mirror of it, by one request.

Runs in: supervisor (stat) and fetchers (read).

    hf://datasets/OWNER/NAME[@REVISION]/path      also hf://OWNER/NAME/… for models

HF_ENDPOINT names a mirror; HF_TOKEN, or what `hf auth login` has kept, opens private data sets.
A file's version is the digest that the hub knows it by, so the same bytes are the same shard in
any revision.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import NamedTuple

import urllib3

from pipeline.errors import SourceError
from pipeline.http_source import HttpSource
from pipeline.redaction import hide_value
from pipeline.sources import Stat

_ENDPOINT = "https://huggingface.co"
_REPO = re.compile(
    r"hf://(?:(?P<kind>datasets|models|spaces)/)?"
    r"(?P<owner>(?!(?:datasets|models|spaces)/)[^/@]+)/(?P<name>[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)


class Place(NamedTuple):
    """What a hub address says."""

    kind: str  # dataset, model or space
    repo: str  # OWNER/NAME
    revision: str
    path: str

    @property
    def name(self) -> str:
        """The address without its revision, which the shard's version stands for."""
        return self.at("")

    def at(self, revision: str, path: str | None = None) -> str:
        """The address of a path in another revision."""
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        at = f"@{urllib.parse.quote(revision, safe='')}" if revision else ""
        return f"hf://{kind}{self.repo}{at}/{self.path if path is None else path}"


def place(url: str) -> Place:
    """Read a hub address.

    Raises:
        SourceError: it is none.
    """
    said = _REPO.fullmatch(url)
    if said is None:
        form = "hf://datasets/OWNER/NAME[@REVISION]/path"
        raise SourceError(f"{url}: a hub address has the form {form}", "correct it")
    revision = urllib.parse.unquote(said["revision"] or "main")
    kind = (said["kind"] or "models").removesuffix("s")
    return Place(kind, f"{said['owner']}/{said['name']}", revision, said["path"] or "")


def endpoint() -> str:
    """The hub, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")


def token() -> str | None:
    """HF_TOKEN, or what `hf auth login` has kept; hidden from every text."""
    given = os.environ.get("HF_TOKEN")
    if not given:
        from huggingface_hub import get_token

        given = get_token()
    if given:
        hide_value(given)
    return given


# ── one shard ───────────────────────────────────────────────────────────────────────────────


class HubSource(HttpSource):
    """One file of the hub: it is redirected to a host that need not know the hub's versions, so
    they are those of the redirect.

    Args:
        url: See the module.
        timeout_s: Seconds of silence after which a connection is given up.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._place = at = place(url)
        kind = "" if at.kind == "model" else f"{at.kind}s/"
        revision = urllib.parse.quote(at.revision, safe="")
        address = f"{endpoint()}/{kind}{at.repo}/resolve/{revision}/{urllib.parse.quote(at.path)}"
        super().__init__(address, timeout_s)
        self._name = at.name
        self._linked = self._size = ""
        if secret := token():
            self._credentials = {"Authorization": f"Bearer {secret}"}

    def stat(self) -> Stat:
        """See Source."""
        self._linked = self._size = ""
        stat = super().stat()
        return Stat(int(self._size) if self._size.isdecimal() else stat.size_bytes, stat.version)

    def _passed(self, response: urllib3.BaseHTTPResponse) -> None:
        self._linked = _digest(response.headers.get("X-Linked-ETag", "")) or self._linked
        self._size = response.headers.get("X-Linked-Size", self._size)

    def _version(self, response: urllib3.BaseHTTPResponse) -> str:
        """The file's digest: of the redirect, or of an answer that comes from the hub itself."""
        said = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
        return self._linked or _digest(said)

    def _refuse(self, response: urllib3.BaseHTTPResponse) -> None:
        code = response.headers.get("X-Error-Code", "")
        if response.status in (401, 403, 404):
            response.close()
            raise refusal(response.status, code, self._place)
        super()._refuse(response)


def _digest(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def refusal(status: int, code: str, at: Place) -> SourceError:
    """What a refusal of the hub means: it does not tell a private data set from none."""
    where = f"{at.kind} {at.repo}"
    page = f"{endpoint()}/{'' if at.kind == 'model' else at.kind + 's/'}{at.repo}"
    if code == "GatedRepo":
        return SourceError(
            f"{at.name}: the {where} is open to those who accept its terms",
            f"accept them at {page}, and set HF_TOKEN to a token of the same account",
        )
    if code == "RevisionNotFound":
        return SourceError(
            f"{at.name}: the {where} has no revision {at.revision}",
            "give a branch, tag or commit of it, or none for main",
        )
    if code == "EntryNotFound":
        return SourceError(
            f"{at.name}: the {where} has no {at.path or 'such file'} in revision {at.revision}",
            f"see what it has at {page}/tree/{at.revision}",
        )
    if status in (401, 404) and token() is None:
        return SourceError(
            f"{at.name}: there is no {where}, or it is private and no token is given",
            "check its name; set HF_TOKEN if it is private",
        )
    if status == 401 and code != "RepoNotFound":
        return SourceError(f"{at.name}: the hub does not know the token", "check HF_TOKEN")
    return SourceError(
        f"{at.name}: there is no {where} that this token may see (HTTP {status})",
        "check its name, and that HF_TOKEN belongs to an account that may read it",
    )
