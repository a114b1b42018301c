"""Listing the Hugging Face hub or a mirror of it, through huggingface_hub.

Runs in: supervisor. Imported only for hf:// addresses: it takes a fifth of a second.

A listing is one request per thousand files, pinned to the commit that the revision names now; its
sizes and digests spare a request per shard.
"""

from __future__ import annotations

import logging
import ssl
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._http import fix_hf_endpoint_in_url

from pipeline import hub_source
from pipeline.errors import SourceError
from pipeline.globs import Glob
from pipeline.http_source import RETRY_STATUS, retry_after_s
from pipeline.hub_source import Place
from pipeline.sources import Listed, Stat, TransientError, certificates

_PATHS_AT_ONCE = 500
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its warnings hold whole URLs


def find(urls: Iterable[str], timeout_s: float) -> dict[str, list[Listed]]:
    """What lies at hub addresses: a file, the files of a folder, or what a glob matches.

    Args:
        urls: Addresses; many of one repository and revision cost little more than one.
        timeout_s: Seconds of silence after which a connection is given up.

    Returns:
        Per address, its files in the order of their paths, pinned to a commit; none where nothing
        matches a glob.

    Raises:
        TransientError, SourceError: see Source.
    """
    by_repo: dict[Place, dict[str, Place]] = defaultdict(dict)
    for url in urls:
        at = hub_source.place(url)
        by_repo[at._replace(path="")][url] = at
    found: dict[str, list[Listed]] = {}
    for repo, places in by_repo.items():
        with _client(repo, timeout_s) as client:
            found |= _Repo(repo, client).find(places)
    return found


class _Client(httpx2.Client):
    """What huggingface_hub sends its requests through: refusals are ours, so that retries and
    waits are bounded as everywhere, and the token goes to the hub alone."""

    def __init__(self, at: Place, timeout_s: float) -> None:
        trusted = certificates()
        verify = ssl.create_default_context(cafile=trusted) if trusted else True
        super().__init__(follow_redirects=True, timeout=timeout_s, verify=verify)
        self.at = at  # what is being asked for

    def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        """Send one request. Raises: TransientError, SourceError."""
        if self.at.repo not in request.url.path:  # huggingface_hub asks who started it, as well
            raise TransientError("only what is listed is asked for")
        url = httpx2.URL(fix_hf_endpoint_in_url(str(request.url), hub_source.endpoint()))
        if url.host != httpx2.URL(hub_source.endpoint()).host:  # the next page of a listing
            request.headers.pop("Authorization", None)
        request.url, request.headers["Host"] = url, url.netloc.decode()
        try:
            response = super().send(request, **how)
        except httpx2.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise SourceError(
                    f"{self.at.name}: its certificate is not trusted",
                    "set SSL_CERT_FILE to your authority's certificate if the server is yours",
                ) from None
            raise TransientError(f"{self.at.name}: {_said(error)}") from None
        except httpx2.TooManyRedirects:
            raise SourceError(f"{self.at.name}: too many redirects", "check HF_ENDPOINT") from None
        status = response.status_code
        if status in RETRY_STATUS:
            raise TransientError(f"{self.at.name}: HTTP {status}", retry_after_s(response.headers))
        if status in (401, 403, 404):
            code = response.headers.get("X-Error-Code", "")
            raise hub_source.refusal(status, code, self.at)
        if status >= 400:
            raise SourceError(f"{self.at.name}: HTTP {status}", "check the address")
        return response


def _said(error: httpx2.TransportError) -> str:
    match error:
        case httpx2.ProxyError():
            return "no connection to the proxy"
        case httpx2.TimeoutException():
            return "no answer in time"
        case httpx2.ConnectError():
            return "no connection to the hub"
    return "the connection broke"


@contextmanager
def _client(repo: Place, timeout_s: float) -> Iterator[_Client]:
    """A session of huggingface_hub, which keeps one for the process."""
    client = _Client(repo, timeout_s)
    huggingface_hub.set_client_factory(lambda: client)
    try:
        yield client
    except HFValidationError:
        raise SourceError(f"{repo.name}: no {repo.kind} has such a name", "correct it") from None
    except (ValueError, KeyError, TypeError):  # of reading an answer
        raise SourceError(
            f"{repo.name}: {hub_source.endpoint()} does not answer as the hub does",
            "check HF_ENDPOINT and the proxy",
        ) from None
    finally:
        huggingface_hub.close_session()


class _Repo:
    """One repository at the commit that its revision names now."""

    def __init__(self, repo: Place, client: _Client) -> None:
        self._repo, self._client = repo, client
        self._api = HfApi(endpoint=hub_source.endpoint(), token=hub_source.token() or False)
        info = self._api.repo_info(
            repo.repo,
            revision=repo.revision,
            repo_type=repo.kind,
            expand=["sha"],  # type: ignore[arg-type]  # of any kind
        )
        if not info.sha:
            raise ValueError("no commit")
        self._commit = info.sha
        self._which: dict[str, Any] = {"repo_type": repo.kind, "revision": self._commit}

    def find(self, places: dict[str, Place]) -> dict[str, list[Listed]]:
        """See find."""
        literal = {url: at.path.rstrip("/") for url, at in places.items()}
        files = self._files(path for path in literal.values() if path and not Glob.is_in(path))
        return {
            url: [files[path]] if (path := literal[url]) in files else self._below(at)
            for url, at in places.items()
        }

    def _files(self, paths: Iterable[str]) -> dict[str, Listed]:
        """Those of the paths that are files, some hundreds a request."""
        wanted = list(paths)
        found: dict[str, Listed] = {}
        for at in range(0, len(wanted), _PATHS_AT_ONCE):
            some = wanted[at : at + _PATHS_AT_ONCE]
            infos = self._api.get_paths_info(self._repo.repo, some, **self._which)
            found |= {one.path: self._listed(one) for one in infos if isinstance(one, RepoFile)}
        return found

    def _below(self, at: Place) -> list[Listed]:
        """What a glob matches, or what lies directly in a folder."""
        glob = Glob(at.path) if Glob.is_in(at.path) else Glob.of_folder(at.path)
        self._client.at = at._replace(path=glob.folder)
        tree = self._api.list_repo_tree(
            self._repo.repo, glob.folder or None, recursive=glob.deep, **self._which
        )
        files = [one for one in tree if isinstance(one, RepoFile) and glob.matches(one.path)]
        return [self._listed(one) for one in sorted(files, key=lambda one: one.path)]

    def _listed(self, file: RepoFile) -> Listed:
        sha256 = file.lfs.sha256 if file.lfs else None
        stat = Stat(int(file.size), sha256 or file.blob_id)
        return Listed(self._repo.at(self._commit, file.path), stat, sha256)
