"""Servers that say what is not so: lengths, versions, redirects, certificates."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from pipeline import catalog, http_source
from pipeline.codecs import open_documents
from pipeline.errors import ShardError, SourceError
from pipeline.messages import (
    ShardFetched,
)
from tests.fetched import DATA, NAME, OPTIONS, Fetched
from tests.harness import english, write_shards
from tests.proxy import Fault, Request, always, fault_proxy, header, in_turn, simple
from tests.servers import Behaviour, Tls, http_server

# ── lengths and versions ────────────────────────────────────────────────────────────────────

LENGTHS = ["", "abc", "-5", "1, 2", "300000, 300000", "+5", "0x10", "٣", "9" * 30, "1e5", "5.0"]


@pytest.mark.parametrize("said", LENGTHS)
def test_a_length_that_is_none_is_an_error_or_unknown(
    tmp_path: Path, served: tuple[str, Behaviour, Path], said: str
) -> None:
    lie = Fault(head=lambda head: header("Content-Length", None)(head).replace(
        b"\r\n", f"\r\nContent-Length: {said}\r\n".encode(), 1))  # fmt: skip
    with fault_proxy(served[0], always(lie)) as proxy:
        try:
            fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", max_retries=1)
        except SourceError as error:
            assert NAME in error.what
            return
    if isinstance(fetched.answer, ShardFetched):
        assert fetched.path.read_bytes() == DATA
    else:
        fetched.failed("")


def test_a_missing_length_is_found_out(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    with fault_proxy(served[0], always(Fault(head=header("Content-Length", None)))) as proxy:
        Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}").ok()
    served[1].no_length.add(NAME)
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000))) as proxy:
        Fetched(tmp_path / "chunked", f"{proxy.url}/{NAME}").ok()


def test_a_length_too_long_is_given_up(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    lie = Fault(head=header("Content-Length", "300100"))
    with fault_proxy(served[0], always(lie)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.failed("")
    with fault_proxy(served[0], always(lie, "GET")) as proxy:
        fetched = Fetched(tmp_path / "other", f"{proxy.url}/{NAME}")
    fetched.failed("is 300100 bytes long now, and 300000 when the run began")


def test_a_length_too_short_is_found_when_the_shard_is_read(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path / "served", english(40), 1)
    lie = Fault(head=header("Content-Length", str(path.stat().st_size - 100)))
    with http_server(path.parent) as url, fault_proxy(url, always(lie)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{path.name}")
    with pytest.raises(ShardError, match=r"shard-00000.tar.bz2 is damaged or cut off"):
        list(open_documents(str(fetched.path), path.name, "text"))


@pytest.mark.parametrize("ignores_if_match", [False, True])
def test_a_shard_that_changes_between_two_ranges_is_never_mixed(
    tmp_path: Path, served: tuple[str, Behaviour, Path], ignores_if_match: bool
) -> None:
    url, how, _ = served

    def plan(request: Request) -> Fault | None:
        drop = frozenset({"if-match"}) if ignores_if_match else frozenset[str]()
        if request.method == "GET" and how.etag[NAME] == '"one"':
            how.etag[NAME] = '"two"'  # from the next request on
            return Fault(
                close_at=150_000, head=header("ETag", '"one"'), drop=frozenset({"if-match"})
            )
        return Fault(drop=drop)

    with fault_proxy(url, plan) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    failed = fetched.failed("is another version now")
    assert "nobody writes" in failed.remedy
    assert not list((tmp_path / "cache").glob("*.shard"))


def test_a_server_with_two_versions_is_tried_again(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    """One of several servers behind an address may lag."""
    other = Fault(head=header("ETag", '"two"'))
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000), other)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert fetched.ok().refetched_bytes > 100_000


def test_a_shard_that_grew_or_shrank_is_refused(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    url, _, folder = served
    for number, data in enumerate((DATA + b"more", DATA[:-4])):
        (folder / NAME).write_bytes(DATA)

        def plan(request: Request, data: bytes = data) -> Fault | None:
            if request.method == "HEAD":
                return None
            (folder / NAME).write_bytes(data)
            return Fault(head=header("ETag", '"one"'))

        with fault_proxy(url, plan) as proxy:
            fetched = Fetched(tmp_path / str(number), f"{proxy.url}/{NAME}")
        fetched.failed(f"is {len(data)} bytes long now, and 300000 when the run began")


# ── redirects, names, certificates ──────────────────────────────────────────────────────────


def test_credentials_stay_with_their_host(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    with fault_proxy(served[0]) as other:
        elsewhere = Fault(answer=simple("302 Found", Location=f"{other.url}/{NAME}?signed=1"))
        with fault_proxy(served[0], always(elsewhere)) as first:
            address = first.url.replace("//", "//user:password@")
            Fetched(tmp_path / "cache", f"{address}/{NAME}").ok()
    assert all("authorization" in one.headers for one in first.requests)
    assert len(other.requests) == len(first.requests) == 2
    for one in other.requests:
        assert not {"authorization", "cookie"} & set(one.headers)

    def to_itself(request: Request) -> Fault | None:
        if request.name == NAME:
            return None
        return Fault(answer=simple("307 Temporary Redirect", Location=f"./{NAME}"))

    with fault_proxy(served[0], to_itself) as same:
        address = same.url.replace("//", "//user:password@")
        fetched = Fetched(tmp_path / "same", f"{address}/elsewhere.bin")
    assert isinstance(fetched.answer, ShardFetched)
    assert all("authorization" in one.headers for one in same.requests)


@pytest.mark.parametrize("target", ["ftp://host/x", "file:///etc/passwd", "http://[bad/", "//", ""])
def test_redirects_to_nowhere_are_refused(
    tmp_path: Path, served: tuple[str, Behaviour, Path], target: str
) -> None:
    with (
        fault_proxy(served[0], always(Fault(answer=simple("302 Found", Location=target)))) as proxy,
        pytest.raises(SourceError, match=NAME),
    ):
        Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")


def test_redirects_end(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    """Also one that asks to wait an hour, and one whose own body never ends."""
    answer = simple("301 Moved", Location=f"/{NAME}", Retry_After="3600")
    with fault_proxy(served[0], always(Fault(answer=answer))) as proxy:
        with pytest.raises(SourceError, match="more than 10 redirects"):
            Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
        assert len(proxy.requests) == 11
    endless = answer.replace(b"Content-Length: 0\r\n", b"")
    stuck = Fault(answer=endless + b"x", stall_at=len(endless) + 1)
    begin = time.monotonic()
    with fault_proxy(served[0], in_turn(stuck)) as proxy:
        Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}").ok()
    assert time.monotonic() - begin < 4


def test_a_name_that_is_not_known(short_waits: None) -> None:
    with pytest.raises(SourceError) as caught:
        catalog.build(["http://nobody.invalid/shard.bin"], OPTIONS)
    assert "nobody.invalid/shard.bin: its host's name is not known (4 att" in caught.value.what
    assert "check the name" in caught.value.remedy


def test_one_shards_patience_is_enough_for_all(short_waits: None) -> None:
    """A catalog of many shards on a dead server gives up as soon as one."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"no connection \(4 attempts"):
        catalog.build([f"http://127.0.0.1:{port}/{{0000..1999}}.bin"], OPTIONS)
    assert time.monotonic() - begin < 5


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_an_unknown_certificate_is_refused(
    tmp_path: Path, served: tuple[str, Behaviour, Path],
    tls: Tls, monkeypatch: pytest.MonkeyPatch, variable: str,
) -> None:  # fmt: skip
    with http_server(served[2], Behaviour(), tls.context) as url:
        http_source._pool.cache_clear()
        with pytest.raises(SourceError) as caught:
            catalog.build([f"{url}/{NAME}"], OPTIONS)
        assert caught.value.what.endswith("its certificate is not trusted")
        assert "SSL_CERT_FILE" in caught.value.remedy
        wrong_host = url.replace("127.0.0.1", "localhost")
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        monkeypatch.setenv(variable, str(tls.certificate))
        with pytest.raises(SourceError, match="not trusted"):
            catalog.build([f"{wrong_host}/{NAME}"], OPTIONS)
        Fetched(tmp_path / "cache", f"{url}/{NAME}").ok()
        monkeypatch.setenv(variable, "/nowhere.pem")
        with pytest.raises(SourceError, match=f"{variable}: there is no file"):
            catalog.build([f"{url}/{NAME}"], OPTIONS)
    http_source._pool.cache_clear()


def test_addresses_that_differ_in_their_query_alone_are_two_shards(
    served: tuple[str, Behaviour, Path],
) -> None:
    """Their names hide the query: they must not share a file in the cache."""
    urls = [f"{served[0]}/{NAME}?part={part}" for part in (1, 2)]
    one, two = catalog.build(urls, OPTIONS)
    assert one.name == f"{served[0]}/{NAME}"
    assert two.name == f"{one.name} (2)"
    assert one.key != two.key
