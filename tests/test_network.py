"""Networks and servers that fail, stall and lie: the fetcher against a real proxy.

Most tests run the fetcher's own code in this process, over a real socket to a real server; whole
runs are at the end.
"""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import catalog, http_source, sources
from pipeline.channel import Channel, ClosedError
from pipeline.codecs import open_documents
from pipeline.errors import ShardError, SourceError
from pipeline.messages import (
    Fetch,
    FetcherSetup,
    FetchFailed,
    FetchProgress,
    Grant,
    Log,
    ReserveMore,
    ShardFetched,
)
from pipeline.sources import Patience, TransientError
from pipeline.workers.fetcher import Fetcher
from tests.harness import english, events, finish, job, run, start, write_shards
from tests.proxy import Fault, Proxy, Request, always, fault_proxy, header, in_turn, simple
from tests.servers import Behaviour, http_server, s3_server
from tests.test_pipeline import reference

OPTIONS = {"timeout_s": 5.0, "max_retries": 3, "min_bytes_per_s": 0.0}
NAME = "shard.bin"
DATA = np.random.default_rng(1).bytes(300_000)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts are a hundredth of what they are in production."""
    monkeypatch.setattr(sources, "_FIRST_WAIT_S", 0.002)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Behaviour, Path]]:
    """A file server with one shard: URL, behaviour, folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    how = Behaviour(etag={NAME: '"one"'})
    with http_server(folder, how) as url:
        yield url, how, folder


class Fetched:
    """One shard through catalog and fetcher, as in a run.

    Args:
        folder: Of the cache.
        url: Of the shard.
        options: Beside OPTIONS.
    """

    def __init__(self, folder: Path, url: str, **options: float) -> None:
        folder.mkdir(exist_ok=True)
        settings = OPTIONS | options
        (shard,) = catalog.build([url], settings)
        ours, theirs = socket.socketpair()
        fetcher = Fetcher(Channel(theirs), FetcherSetup(str(folder), settings))
        self._errors: list[BaseException] = []
        self.logs: list[Log] = []
        begin = time.monotonic()
        thread = threading.Thread(target=self._serve, args=(fetcher,), daemon=True)
        thread.start()
        supervisor = Channel(ours)
        limit = shard.size_bytes or 1 << 16
        supervisor.send(
            Fetch(0, shard.url, shard.name, shard.key, shard.size_bytes, shard.version, limit)
        )
        self.answer = self._answer(supervisor, limit)
        self.seconds = time.monotonic() - begin
        ours.close()
        thread.join(10)
        assert not self._errors
        self.path = folder / getattr(self.answer, "file_name", "")

    def _serve(self, fetcher: Fetcher) -> None:
        try:
            fetcher.run()
        except ClosedError:
            pass
        except BaseException as error:
            self._errors.append(error)
            raise

    def _answer(self, supervisor: Channel, limit: int) -> ShardFetched | FetchFailed:
        while True:
            message = supervisor.receive(timeout_s=30)
            match message:
                case ShardFetched() | FetchFailed():
                    return message
                case ReserveMore():
                    limit += 1 << 16
                    supervisor.send(Grant(0, limit))
                case Log():
                    self.logs.append(message)
                case FetchProgress():
                    pass
                case _:
                    raise AssertionError(f"{message!r} {self._errors}")

    def ok(self) -> ShardFetched:
        """Assert that the shard is here, to the byte."""
        assert isinstance(self.answer, ShardFetched), self.answer
        assert self.path.read_bytes() == DATA
        return self.answer

    def failed(self, what: str) -> FetchFailed:
        """Assert that it was given up, with an error that names shard and remedy."""
        assert isinstance(self.answer, FetchFailed), self.answer
        assert NAME in self.answer.what
        assert what in self.answer.what
        assert self.answer.remedy
        return self.answer


# ── connections that break ──────────────────────────────────────────────────────────────────

HEAD_BYTES = 129
PLACES = [*range(0, 140, 6), 300, 1000, 4095, 4096, 65_537, 99_999, 150_000, 262_144, 300_100]


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("how", ["reset", "close"])
def test_an_answer_cut_at_any_byte_goes_on_behind_it(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int, how: str
) -> None:
    fault = Fault(reset_at=at) if how == "reset" else Fault(close_at=at)
    with fault_proxy(served[0], in_turn(fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert fetched.ok().refetched_bytes == 0
    assert proxy.faults == 1
    first, second = proxy.gets(NAME)
    assert first.start == 0
    assert (second.start > 0) == (at > HEAD_BYTES)
    if how == "close":  # a reset may swallow what was on its way
        assert proxy.sent[NAME] == len(DATA)


@pytest.mark.parametrize("at", [0, 1, 16, 17, 30, 50, 70, 90, 100, 110, 115, 120])
@pytest.mark.parametrize("length", [True, False])
def test_headers_that_are_cut_off_are_not_believed(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int, length: bool
) -> None:
    """A closed connection looks like the end of the headers: half a length is a length."""
    if not length:
        served[1].no_length.add(NAME)
    left = [Fault(close_at=at)] * 2

    def plan(request: Request) -> Fault | None:
        return left.pop() if left else None

    with fault_proxy(served[0], plan) as proxy:
        Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}").ok()
    assert proxy.faults == 2


def test_progress_does_not_count_against_the_retries(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    faults = [Fault(reset_at=20_000)] * 14
    with fault_proxy(served[0], in_turn(*faults)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", max_retries=1)
    fetched.ok()
    assert len(proxy.gets(NAME)) == 15
    assert fetched.logs, "the retries were not logged"


def test_a_byte_now_and_then_is_no_progress(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    """Or a server could hold a run for ever."""
    with fault_proxy(served[0], always(Fault(reset_at=300), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", min_bytes_per_s=1e7)
    fetched.failed("the connection broke (4 attempts without progress)")


def test_bytes_fetched_twice_stay_under_five_percent(tmp_path: Path) -> None:
    """One reset per shard, at a random place."""
    folder = tmp_path / "served"
    folder.mkdir()
    random = np.random.default_rng(2)
    size, number = 2_000_000, 12
    for index in range(number):
        (folder / f"{index}.bin").write_bytes(random.bytes(size))
    with http_server(folder) as url:
        for index in range(number):
            plan = in_turn(Fault(reset_at=int(random.integers(size))))
            with fault_proxy(url, plan) as proxy:
                fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{index}.bin")
                assert isinstance(fetched.answer, ShardFetched)
                assert fetched.path.read_bytes() == (folder / f"{index}.bin").read_bytes()
                assert proxy.faults == 1
                assert proxy.sent[f"{index}.bin"] <= 1.05 * size


def test_without_ranges_it_starts_over(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    served[1].no_ranges = True
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000))) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert 100_000 < fetched.ok().refetched_bytes < 150_000


@pytest.mark.parametrize("said", ["bytes 5-299999/300000", "bytes */300000", "nonsense", None])
def test_ranges_that_lie_are_not_used(
    tmp_path: Path, served: tuple[str, Behaviour, Path], said: str | None
) -> None:
    lie = Fault(head=header("Content-Range", said))
    with fault_proxy(served[0], in_turn(Fault(close_at=150_000), lie)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    assert fetched.ok().refetched_bytes > 0
    assert [get.start > 0 for get in proxy.gets(NAME)] == [False, True, False]


# ── servers that refuse, and say when ───────────────────────────────────────────────────────


def in_seconds(seconds: float) -> str:
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(when, usegmt=True)


@pytest.mark.parametrize(("status", "asked", "least_s"), [
    ("429 Too Many Requests", "1", 1.0), ("503 Service Unavailable", "date", 1.0),
    ("503 Service Unavailable", "0", 0), ("429 Too Many Requests", "-5", 0), ("429 ", "soon", 0),
    ("429 ", "1e9", 0), ("503 ", "9" * 400 + "x", 0), ("503 ", "", 0),
    ("503 ", "Tue, 99 Nov 2026 99:99:99 GMT", 0),
])  # fmt: skip
def test_retry_after_is_kept_to(
    tmp_path: Path, served: tuple[str, Behaviour, Path], status: str, asked: str, least_s: float
) -> None:
    value = in_seconds(2.2) if asked == "date" else asked
    fault = Fault(answer=simple(status, Retry_After=value))
    with fault_proxy(served[0], in_turn(fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.ok()
    assert least_s <= fetched.seconds < 10


def test_no_wait_is_longer_than_a_minute() -> None:
    for asked in (61.0, 1e9):
        assert Patience(1).pause_s(TransientError("x", asked)) == 60
    patience = Patience(40)
    assert max(patience.pause_s(TransientError("x")) for _ in range(40)) <= 60
    with pytest.raises(SourceError, match="41 attempts without progress"):
        patience.pause_s(TransientError("x"))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_errors_that_pass_are_waited_out(
    tmp_path: Path, served: tuple[str, Behaviour, Path], status: int
) -> None:
    fault = Fault(answer=simple(f"{status} Later", b"<h1>not now</h1>"))
    with fault_proxy(served[0], in_turn(fault, fault, Fault(close_at=99_999), fault)) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", max_retries=2)
    assert fetched.ok().refetched_bytes == 0


def test_errors_that_stay_are_given_up(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    with fault_proxy(served[0], always(Fault(answer=simple("500 Oops")), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.failed("HTTP 500 (4 attempts without progress)")
    assert len(proxy.gets(NAME)) == 4
    with fault_proxy(served[0], always(Fault(answer=simple("410 Gone")), "GET")) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}")
    fetched.failed("HTTP 410")
    assert len(proxy.gets(NAME)) == 1, "what is final is not tried again"


# ── servers that are slow ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [0, 50, 150_000])
def test_silence_is_given_up_and_the_rest_fetched_elsewhere(
    tmp_path: Path, served: tuple[str, Behaviour, Path], at: int
) -> None:
    with fault_proxy(served[0], in_turn(Fault(stall_at=at))) as proxy:
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", timeout_s=0.4)
    assert fetched.ok().refetched_bytes == 0
    assert 0.4 <= fetched.seconds < 4
    assert (proxy.gets(NAME)[1].start > 0) == (at > 1000)


def test_a_server_slower_than_the_limit_is_given_up(
    tmp_path: Path, served: tuple[str, Behaviour, Path]
) -> None:
    slow = Fault(bytes_per_s=40_000)
    with fault_proxy(served[0], always(slow, "GET")) as proxy:
        limits = {"min_bytes_per_s": 2e5, "timeout_s": 0.4}
        fetched = Fetched(tmp_path / "cache", f"{proxy.url}/{NAME}", **limits)
    failed = fetched.failed("slower than 200000 B/s for 0 s (4 attempts without progress)")
    assert "data.stream.min_bytes_per_s" in failed.remedy
    assert fetched.seconds < 10
    starts = [get.start for get in proxy.gets(NAME)]
    assert starts == sorted(starts), "what a slow connection brought is kept"
    with fault_proxy(served[0], in_turn(slow)) as proxy:
        other = Fetched(tmp_path / "other", f"{proxy.url}/{NAME}", **limits)
    assert other.ok().refetched_bytes == 0


def test_waiting_for_a_grant_is_not_slowness(tmp_path: Path) -> None:
    """Only the network's own time counts."""
    from pipeline.workers.fetcher import _Pace

    pace = _Pace("x", {"min_bytes_per_s": 1e3, "timeout_s": 0.05})
    for _ in pace.timed(iter([b"a" * 100] * 5)):
        time.sleep(0.06)
    assert pace.was_enough()


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


def test_a_name_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        catalog.build(["http://nobody.invalid/shard.bin"], OPTIONS)
    assert "nobody.invalid/shard.bin: its host's name is not known (4 att" in caught.value.what
    assert "check the name" in caught.value.remedy


def test_one_shards_patience_is_enough_for_all() -> None:
    """A catalog of many shards on a dead server gives up as soon as one."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"no connection \(4 attempts"):
        catalog.build([f"http://127.0.0.1:{port}/{{0000..1999}}.bin"], OPTIONS)
    assert time.monotonic() - begin < 5


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(__import__("ipaddress").ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(made.public_bytes(pem))
    path.with_name("both.pem").write_bytes(
        key.private_bytes(pem, form, serialization.NoEncryption()) + made.public_bytes(pem)
    )
    return path


def test_an_unknown_certificate_is_refused(
    tmp_path: Path, served: tuple[str, Behaviour, Path],
    certificate: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_name("both.pem"))
    with http_server(served[2], Behaviour(), context) as url:
        http_source._pool.cache_clear()
        with pytest.raises(SourceError) as caught:
            catalog.build([f"{url}/{NAME}"], OPTIONS)
        assert caught.value.what.endswith("its certificate is not trusted")
        assert "SSL_CERT_FILE" in caught.value.remedy
        wrong_host = url.replace("127.0.0.1", "localhost")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        http_source._pool.cache_clear()
        with pytest.raises(SourceError, match="not trusted"):
            catalog.build([f"{wrong_host}/{NAME}"], OPTIONS)
        Fetched(tmp_path / "cache", f"{url}/{NAME}").ok()
    http_source._pool.cache_clear()


# ── s3 ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_server("bucket", {NAME: DATA}) as variables:
        yield variables


@pytest.fixture
def s3(bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An S3 server behind the proxy; the environment leads to it."""
    with fault_proxy(bucket["AWS_ENDPOINT_URL"]) as proxy:
        for key, value in (bucket | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(key, value)
        yield proxy


ADDRESS = f"s3://bucket/{NAME}"


@pytest.mark.parametrize("fault", [
    Fault(reset_at=150_000), Fault(close_at=150_000), Fault(stall_at=150_000),
    Fault(reset_at=10), Fault(answer=simple("503 Slow Down")), Fault(answer=simple("500 Oops")),
])  # fmt: skip
def test_s3_goes_on_where_it_was_cut_off(tmp_path: Path, s3: Proxy, fault: Fault) -> None:
    s3.plan = in_turn(fault)
    assert Fetched(tmp_path / "cache", ADDRESS, timeout_s=1).ok().refetched_bytes == 0
    assert s3.faults == 1
    if fault.end == 150_000:
        assert s3.gets(NAME)[1].start > 100_000


def refusal(code: str) -> bytes:
    said = f"<Error><Code>{code}</Code><Message>secret-text</Message></Error>".encode()
    return simple("400 Bad Request" if code == "ExpiredToken" else "403 Forbidden", said)


@pytest.mark.parametrize(("code", "remedy"), [
    ("ExpiredToken", "get new credentials"), ("InvalidAccessKeyId", "does not know this key"),
    ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"), ("AccessDenied", "AWS_SKIP_SIGNATURE"),
    ("RequestTimeTooSkewed", "clock"), ("AuthorizationHeaderMalformed", "AWS_REGION"),
])  # fmt: skip
def test_s3_says_what_is_wrong_with_the_credentials(
    tmp_path: Path, s3: Proxy, code: str, remedy: str
) -> None:
    def plan(request: Request) -> Fault:
        answer = refusal(code)
        return Fault(answer=answer.partition(b"<")[0] if request.method == "HEAD" else answer)

    s3.plan = plan
    with pytest.raises(SourceError) as caught:
        Fetched(tmp_path / "cache", ADDRESS)
    assert ADDRESS in caught.value.what
    assert code in caught.value.what
    assert remedy in caught.value.remedy
    assert "secret-text" not in str(caught.value)
    assert len(s3.requests) == 2, "what is final is not tried again"


def test_s3_credentials_that_expire_in_mid_shard(tmp_path: Path, s3: Proxy) -> None:
    s3.plan = in_turn(Fault(close_at=150_000), Fault(answer=refusal("ExpiredToken")))
    failed = Fetched(tmp_path / "cache", ADDRESS).failed("ExpiredToken")
    assert "the same command resumes" in failed.remedy


# ── whole runs ──────────────────────────────────────────────────────────────────────────────

DOCUMENTS = english(120)
SHARDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_shards(folder, DOCUMENTS, SHARDS)
    return folder


def test_a_run_through_every_fault_gives_the_same_stream(tmp_path: Path, folder: Path) -> None:
    later = Fault(answer=simple("503 Later", Retry_After="1"))
    faults: dict[int, list[Fault | None]] = {
        0: [Fault(reset_at=20_000), Fault(reset_at=10), None],
        1: [Fault(close_at=9_000), Fault(answer=simple("429 Slow", Retry_After=in_seconds(1)))],
        2: [later, Fault(answer=simple("500 Oops"))],
        3: [Fault(stall_at=5_000)],
        4: [Fault(close_at=7_000), Fault(head=header("Content-Range", "bytes 3-9/10"))],
        5: [Fault(head=header("ETag", '"other"'))],
        6: [Fault(bytes_per_s=5_000), None],
    }
    plans = [in_turn(*some, name=f"shard-{n:05d}.tar.bz2") for n, some in faults.items()]

    def plan(request: Request) -> Fault | None:
        return next((fault for one in plans if (fault := one(request))), None)

    with http_server(folder) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/shard-{{00000..{SHARDS - 1:05d}}}.tar.bz2"]
        one = job(tmp_path, shards, timeout_s=1, fetchers=3, min_bytes_per_s=20_000)
        summary = run(tmp_path, one)
    assert summary["sha256"] == hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()
    assert summary["restarts"] == 0
    assert proxy.faults == 11


@pytest.mark.parametrize(("fault", "code", "what", "remedy"), [
    (Fault(reset_at=0), 5, "the connection broke (2 attempts", "the same command resumes"),
    (Fault(answer=simple("403 Forbidden")), 5, "HTTP 403", "expired"),
    (Fault(head=header("Content-Length", None), close_at=15_000), 3, "damaged or cut off", "again"),
])  # fmt: skip
def test_a_run_that_must_give_up_says_so(
    tmp_path: Path, folder: Path, fault: Fault, code: int, what: str, remedy: str
) -> None:
    def plan(request: Request) -> Fault | None:
        if "00005" not in request.name:
            return None
        if request.method == "HEAD":
            return Fault(head=header("Content-Length", None)) if fault.head else None
        return fault

    shards: list[Any]
    with http_server(folder) as url, fault_proxy(url, plan) as proxy:
        shards = [f"{proxy.url}/shard-{{00000..{SHARDS - 1:05d}}}.tar.bz2"]
        begin = time.monotonic()
        process = start(tmp_path, job(tmp_path, shards, timeout_s=1, max_retries=1))
        outcome, err = finish(process)
    assert process.returncode == code, err
    assert "shard-00005.tar.bz2" in outcome["what"]
    assert what in outcome["what"]
    assert remedy in outcome["remedy"]
    assert time.monotonic() - begin < 30
    assert events(err, "stream_ended")
