"""`shards list`: what it prints, as a table and as a manifest, and what it says when it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from pipeline import cli, http_source
from tests import places
from tests.fetched import DATA, NAME, Fetched
from tests.hub import hub_server
from tests.proxy import fault_proxy
from tests.servers import Behaviour, Tls
from tests.stores import store_server

Captured = pytest.CaptureFixture[str]


def listed(capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    """Run `shards list` as its user does: exit code, output, errors."""
    with mock.patch.object(sys, "argv", ["fineweb-pipeline", "shards", "list", *arguments]):
        try:
            cli.main()
            code: object = 0
        except SystemExit as left:
            code = left.code
    out, err = capsys.readouterr()
    assert isinstance(code, int)
    return code, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, size in enumerate((100, 20_000, 3)):
        (folder / f"part-{number}.jsonl").write_bytes(b"x" * size)
    return folder


def test_a_table_with_totals(folder: Path, capsys: Captured) -> None:
    code, out, err = listed(capsys, f"{folder}/part-{{1,0}}.jsonl")
    first, second, totals = out.splitlines()
    assert code == 0
    assert first.split()[:2] == [f"file://{folder}/part-1.jsonl", "20,000"]
    assert second.split()[:2] == [f"file://{folder}/part-0.jsonl", "100"]
    assert totals == "2 shards, 20,100 bytes (0.000 GB)"
    assert not err


def test_json_is_a_manifest_that_is_then_enforced(
    served: tuple[str, Behaviour, Path], tmp_path: Path, capsys: Captured
) -> None:
    url, path = f"{served[0]}/{NAME}", tmp_path / "manifest.jsonl"
    code, out, err = listed(capsys, "--json", url)
    assert (code, json.loads(out)) == (
        0, {"name": url, "size_bytes": len(DATA), "version": '"one"'})  # fmt: skip
    assert "1 shards, 300,000 bytes" in err, "the totals do not stand in the manifest"
    path.write_text(out)
    assert listed(capsys, "--manifest", str(path)) == (0, mock.ANY, "")
    path.write_text(out.replace("300000", "300001"))
    code, _, err = listed(capsys, url, "--manifest", str(path))
    assert code == 5
    assert f"error: {url} has 300000 bytes, and 300001 in the manifest {path}" in err


def test_a_length_that_is_not_known_is_counted_apart(
    served: tuple[str, Behaviour, Path], capsys: Captured
) -> None:
    served[1].no_length.add(NAME)
    code, out, _ = listed(capsys, f"{served[0]}/{NAME}")
    assert code == 0
    assert out.splitlines()[0].split()[1] == "unknown"
    assert out.splitlines()[1] == "1 shards, 0 bytes (0.000 GB) and 1 of unknown size"


def test_secrets_are_not_printed(served: tuple[str, Behaviour, Path], capsys: Captured) -> None:
    address = served[0].replace("//", "//user:that-is-secret@") + f"/{NAME}?sig=that-is-secret"
    for extra in ((), ("--json",)):
        code, out, err = listed(capsys, address, *extra)
        assert code == 0
        assert NAME in out
        assert "that-is-secret" not in out + err
    code, out, err = listed(capsys, address.replace(NAME, "none"))
    assert code == 5
    assert "that-is-secret" not in out + err


def test_what_cannot_be_listed_is_said(folder: Path, capsys: Captured) -> None:
    """Which pattern, what is wrong with it, and what to do."""
    for pattern, code, what, remedy in (
        (f"{folder}/*.parquet", 2, f"{folder}/*.parquet: nothing is at", "check the path"),
        ("http://host/*.tar", 2, "a web server does not list its files", "with braces"),
        ("@none.txt", 2, "--shards @none.txt: No such file", "check the list's path"),
        ("ftp://host/x", 5, "shards cannot come from 'ftp'", "give http://"),
    ):
        assert listed(capsys, pattern) == (code, "", mock.ANY)
        _, _, err = listed(capsys, pattern)
        assert f"error: {what}" in err or what in err
        assert remedy in err
    assert listed(capsys)[0] == 2, "no pattern at all"


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_typo_in_a_bucket_is_not_an_empty_match(
    scheme: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_server("bucket", {"a/1.tar": b"1"}) as url:
        for key, value in store_variables(url).items():
            monkeypatch.setenv(key, value)
        code, out, err = listed(capsys, f"{scheme}://bucket/a/*.tar")
        assert (code, err) == (0, "")
        assert f"{scheme}://bucket/a/1.tar" in out
        code, _, err = listed(capsys, f"{scheme}://bucket/a/*.bin")
        assert code == 2
        assert f"{scheme}://bucket/a/*.bin: nothing matches" in err
        code, _, err = listed(capsys, f"{scheme}://bukcet/a/*.tar")
        assert code == 5
        assert "there is no such" in err
        assert f"{scheme}://bukcet/a" in err


def store_variables(url: str) -> dict[str, str]:
    """What leads to a server of tests/stores.py, for every kind of store."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "us-east-1",
        "GOOGLE_BASE_URL": url, "GOOGLE_SKIP_SIGNATURE": "true",
        "AZURE_STORAGE_ENDPOINT": url, "AZURE_SKIP_SIGNATURE": "true",
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
    }  # fmt: skip


def test_a_private_data_set_without_a_token(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = "hf://datasets/owner/name/*.bin"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server(tmp_path / "cdn", {NAME: DATA}, private="hf_that-is-secret") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        code, _, err = listed(capsys, pattern)
        assert code == 5
        assert "there is no dataset owner/name, or it is private and no token is given" in err
        assert "set HF_TOKEN if it is private" in err
        monkeypatch.setenv("HF_TOKEN", "hf_that-is-secret")
        code, out, err = listed(capsys, pattern)
        assert (code, err) == (0, "")
        assert f"owner/name/{NAME}" in out
        hub.gated = True  # the listing is open, the files are not
        assert listed(capsys, pattern)[0] == 0
        monkeypatch.setenv("HF_TOKEN", "hf_wrong-and-secret")
        code, _, err = listed(capsys, pattern)
        assert code == 5
        assert "there is no dataset owner/name that this token may see" in err
        assert "secret" not in err


def test_attempts_that_are_made_again_are_told(
    served: tuple[str, Behaviour, Path], tmp_path: Path, capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of one shard's size, and of a listing: a wait is never silent."""
    served[1].status[NAME] = [503, 500]
    code, out, err = listed(capsys, f"{served[0]}/{NAME}")
    assert code == 0
    assert NAME in out
    assert f"{served[0]}/{NAME}: HTTP 503; tried again in " in err
    assert len(err.splitlines()) == 1, "once in five seconds"
    with hub_server(tmp_path / "cdn", {NAME: DATA}, limited=1) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        code, out, err = listed(capsys, "hf://datasets/owner/name/*.bin")
    assert code == 0
    assert "HTTP 429; tried again in 1.0 s" in err


# ── certificates and proxies of every kind of source ────────────────────────────────────────


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    http_source._pool.cache_clear()
    yield Tls(tmp_path_factory.mktemp("tls"))
    http_source._pool.cache_clear()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "hf"])
def test_an_authority_of_ones_own_is_trusted_when_it_is_named(
    scheme: str, tmp_path: Path, tls: Tls, capsys: Captured, monkeypatch: pytest.MonkeyPatch,
    short_waits: None,
) -> None:  # fmt: skip
    """For listing and for fetching; else it is refused, and the remedy says which variable."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    at = "hf://datasets/owner/name" if scheme == "hf" else f"{scheme}://bucket"
    with (
        hub_server(tmp_path / "cdn", {NAME: DATA}, tls.context) as hub,
        store_server("bucket", {NAME: DATA}, tls.context) as url,
    ):
        for key, value in (store_variables(url) | {"HF_ENDPOINT": hub.url}).items():
            monkeypatch.setenv(key, value)
        code, _, err = listed(capsys, f"{at}/*.bin")
        assert code == 5
        assert "its certificate is not trusted" in err
        assert "set SSL_CERT_FILE" in err
        monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
        code, out, err = listed(capsys, f"{at}/*.bin")
        assert (code, err) == (0, "")
        assert f"{at}/{NAME}" in out
        Fetched(tmp_path / "cache", f"{at}/{NAME}").ok()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "hf"])
def test_the_environments_proxy_is_gone_through(
    scheme: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For listing and for fetching: the host itself cannot be reached."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    at = "hf://datasets/owner/name" if scheme == "hf" else f"{scheme}://bucket"
    with (
        hub_server(tmp_path / "cdn", {NAME: DATA}) as hub,
        store_server("bucket", {NAME: DATA}) as url,
        fault_proxy(hub.url if scheme == "hf" else url) as proxy,
    ):
        variables = store_variables("http://store.invalid") | {"HF_ENDPOINT": "http://hub.invalid"}
        for key, value in (variables | {"HTTP_PROXY": proxy.url}).items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # where the hub sends for the bytes
        code, out, err = listed(capsys, f"{at}/*.bin")
        assert (code, err) == (0, "")
        assert f"{at}/{NAME}" in out
        listings = len(proxy.requests)
        assert listings
        Fetched(tmp_path / "cache", f"{at}/{NAME}").ok()
        assert len(proxy.requests) > listings


def test_the_places_of_the_table_are_those_of_the_program() -> None:
    """A kind of source that is added has to be read from as well."""
    from pipeline import store_source

    assert set(places.PLACES) == {"file", "http", "https", "hf", *store_source.SCHEMES}
