"""S3 that breaks off, stalls and refuses: a real server (moto) behind the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from tests.fetched import DATA, NAME, Fetched
from tests.proxy import Fault, Proxy, Request, fault_proxy, in_turn, simple
from tests.servers import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_server("bucket", {NAME: DATA}) as variables:
        yield variables


@pytest.fixture
def s3(
    bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch, short_waits: None
) -> Iterator[Proxy]:
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
