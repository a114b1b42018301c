"""The hub: listing, versions, tokens, limits, against a server that speaks its API."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import catalog, hub_source, listing, manifest
from pipeline.errors import ConfigError, SourceError
from tests.fetched import DATA, NAME, OPTIONS, Fetched
from tests.harness import english, job, run, write_shards
from tests.hub import COMMIT, Hub, hub_server
from tests.proxy import Fault, always, fault_proxy, header, in_turn, simple
from tests.test_pipeline import reference

SET = "hf://datasets/owner/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_waits: None) -> Iterator[Hub]:
    files = {
        "README.md": b"# short",
        NAME: DATA,
        "data/CC-1/000.parquet": b"a" * 100,
        "data/CC-1/001.parquet": b"b" * 200,
        "data/CC-2/000.parquet": b"c" * 300,
        "data/CC-2/notes.txt": b"d" * 400,
    }
    with hub_server(tmp_path / "cdn", files) as hub:
        hub.old = {"data/CC-1/000.parquet": b"o" * 50, NAME: DATA}
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def listed(*patterns: str) -> dict[str, int | None]:
    """What the patterns name, by path, with sizes."""
    found = catalog.build(patterns, OPTIONS)
    return {shard.name.removeprefix(f"{SET}/"): shard.size_bytes for shard in found}


ONE, TWO, THREE = "data/CC-1/000.parquet", "data/CC-1/001.parquet", "data/CC-2/000.parquet"


@pytest.mark.parametrize(("pattern", "names"), [
    ("data/CC-1/*.parquet", [ONE, TWO]), ("data/*/000.parquet", [ONE, THREE]),
    ("**/*.parquet", [ONE, TWO, THREE]), ("data/CC-1", [ONE, TWO]), ("", [NAME]),
    ("data/CC-{1,2}/000.parquet", [ONE, THREE]), ("data/CC-{2,1}/0*", [THREE, ONE, TWO]),
    (NAME, [NAME]),
])  # fmt: skip
@pytest.mark.parametrize("page", [1, 1000])
def test_patterns_name_files(hub: Hub, pattern: str, names: list[str], page: int) -> None:
    hub.page = page
    assert listed(f"{SET}/{pattern}") == {name: len(hub.files[name]) for name in names}
    asked = [one for one in hub.requests if "/resolve/" in one]
    assert not asked, "a listing says sizes and versions: no shard is asked for"


def test_shards_have_the_digests_of_the_hub(hub: Hub) -> None:
    (shard,) = catalog.build([f"{SET}/{ONE}"], OPTIONS)
    assert shard.sha256 == shard.version == hashlib.sha256(hub.files[ONE]).hexdigest()
    assert shard.url == f"{SET}@{COMMIT}/{ONE}", "the commit is fixed"
    (asked,) = catalog._stats([catalog.Found(shard.url, "")], OPTIONS, listing.QUIET)
    assert (asked.size_bytes, asked.version) == (shard.size_bytes, shard.version)
    (small,) = catalog.build([f"{SET}/README.md"], OPTIONS)
    (asked,) = catalog._stats([catalog.Found(small.url, "")], OPTIONS, listing.QUIET)
    assert asked.version == small.version


def test_the_same_bytes_are_the_same_shard_in_any_revision(hub: Hub) -> None:
    assert listed(f"{SET}@v1/{ONE}") == {ONE: 50}
    (new,), (old,) = (catalog.build([f"{SET}{at}/{NAME}"], OPTIONS) for at in ("", "@v1"))
    assert new.key == old.key
    assert new.url != old.url
    assert hub_source.place(f"{SET}@refs/convert/parquet/x/y").revision == "refs/convert/parquet"
    assert hub_source.place(f"{SET}@refs%2Fpr%2F1/y").revision == "refs/pr/1"


@pytest.mark.parametrize(("pattern", "token", "what", "remedy"), [
    ("hf://datasets/owner/nome/x", None, "no dataset owner/nome, or it is private", "HF_TOKEN"),
    ("hf://datasets/owner/nome/x", "hf_wrong", "no dataset owner/nome that this token", "HF_TOKEN"),
    (f"{SET}@v9/x", None, "has no revision v9", "branch, tag or commit"),
    (f"{SET}/data/CC-9/x.parquet", None, "has no data/CC-9/x.parquet in rev", "/tree/"),
    (f"{SET}/data/CC-9/*", None, "has no data/CC-9 in revision", "/tree/"),
    ("hf://datasets/owner", None, "a hub address has the form", "correct"),
    ("hf://datasets/ow ner/name/x", None, "no dataset has such a name", "correct"),
])  # fmt: skip
def test_what_cannot_be_found_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, pattern: str, token: str | None, what: str,
    remedy: str,
) -> None:  # fmt: skip
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceError) as caught:
        listed(pattern)
    assert what in caught.value.what
    assert remedy in caught.value.remedy
    assert "hf_wrong" not in str(caught.value)


def test_a_glob_without_a_match_is_said(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"data/CC-1/\*.bin: nothing matches"):
        listed(f"{SET}/data/CC-1/*.bin")


def test_a_private_data_set_opens_to_its_token_which_the_cdn_never_sees(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = "hf_that-is-secret"
    with pytest.raises(SourceError, match="or it is private and no token is given"):
        listed(f"{SET}/{NAME}")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(hub.private)  # as `hf auth login` leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", tmp_path / "home" / "token")
    with fault_proxy(hub.cdn_url) as cdn:
        hub.cdn_url = cdn.url
        assert Fetched(tmp_path / "cache", f"{SET}/{NAME}").ok().refetched_bytes == 0
    assert cdn.requests
    assert not any("authorization" in one.headers for one in cdn.requests)
    assert hub.tokens[-1] == f"Bearer {hub.private}"


def test_terms_that_are_not_accepted_are_named(tmp_path: Path, hub: Hub) -> None:
    hub.gated = True
    failed = Fetched(tmp_path / "cache", f"{SET}/{NAME}").failed("open to those who accept")
    assert f"{hub.url}/datasets/owner/name" in failed.remedy


def test_a_mirror_is_kept_to(hub: Hub) -> None:
    """Its next page may still be the hub's own address: neither name nor token goes there."""
    hub.page, hub.next_host = 1, "https://huggingface.co"
    assert len(listed(f"{SET}/data/CC-1/*")) == 2


def test_limits_are_kept_to(tmp_path: Path, hub: Hub) -> None:
    """The listing and the fetch wait as long as the hub asks for, then go on."""
    hub.limited = 1
    (shard,) = catalog.build([f"{SET}/{NAME}"], OPTIONS)
    assert hub.requests.count(hub.requests[0]) == 2
    hub.limited = 1
    fetched = Fetched(tmp_path / "cache", shard.url)
    fetched.ok()


def test_a_shard_is_one_request_and_goes_on_where_it_was_cut_off(tmp_path: Path, hub: Hub) -> None:
    with fault_proxy(hub.cdn_url, in_turn(Fault(reset_at=150_000))) as cdn:
        hub.cdn_url = cdn.url
        assert Fetched(tmp_path / "cache", f"{SET}/{NAME}").ok().refetched_bytes == 0
        assert [get.start > 0 for get in cdn.gets(hub.digest(NAME))] == [False, True]
        assert sum("GET /datasets" in one for one in hub.requests) == 2, "one an attempt"
        Fetched(tmp_path / "other", f"{SET}/{NAME}").ok()
    assert sum("GET /datasets" in one for one in hub.requests) == 3


def test_a_file_that_changes_between_two_ranges_is_never_mixed(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub says another digest for the second range, and then the first one again."""
    other = Fault(head=header("X-Linked-ETag", '"beef"'))
    plan = in_turn(None, other, name=NAME)
    with fault_proxy(hub.url, plan) as proxy, fault_proxy(hub.cdn_url) as cdn:
        monkeypatch.setenv("HF_ENDPOINT", proxy.url)
        hub.cdn_url = cdn.url
        cdn.plan = in_turn(Fault(close_at=150_000))
        fetched = Fetched(tmp_path / "cache", f"{SET}/")
    assert fetched.ok().refetched_bytes > 100_000
    assert (proxy.faults, cdn.faults) == (1, 1)


def test_bytes_that_are_not_those_of_the_digest_are_refused(tmp_path: Path, hub: Hub) -> None:
    """Length and version are right, and a byte is not."""
    Fetched(tmp_path / "cache", f"{SET}/{NAME}").ok()
    wrong = simple("200 OK", DATA[:-1] + b"!")
    with fault_proxy(hub.cdn_url, in_turn(Fault(answer=wrong))) as cdn:
        hub.cdn_url = cdn.url
        again = Fetched(tmp_path / "again", f"{SET}/{NAME}")
        assert again.ok().refetched_bytes == len(DATA), "it may have been on the way"
        cdn.plan = always(Fault(answer=wrong), "GET")
        failed = Fetched(tmp_path / "wrong", f"{SET}/{NAME}").failed("has the SHA-256")
        assert len(cdn.requests) == 2 + 3, "it is not tried for ever"
    assert "manifest" in failed.remedy
    assert not list((tmp_path / "wrong").glob("*.shard"))


DOCUMENTS = english(120)


def test_a_run_from_the_hub_gives_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private data set: started, and started again with what the first start has kept."""
    paths = write_shards(tmp_path / "made", DOCUMENTS, 4, "parquet")
    files = {f"data/{path.name}": path.read_bytes() for path in paths}
    with hub_server(tmp_path / "cdn", files, private="hf_that-is-secret", page=2) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_that-is-secret"}
        one = job(tmp_path, [f"{SET}/data/*.parquet"], limit_tokens=1000)
        run(tmp_path, one, **variables)
        kept = manifest.read(tmp_path / "run" / catalog.FILE_NAME)
        assert [entry.sha256 for entry in kept.entries.values()] == list(map(hub.digest, files))
        hub.requests.clear()
        summary = run(tmp_path, job(tmp_path, [f"{SET}/data/*.parquet"]), **variables)
        assert not [one for one in hub.requests if "/api/" in one], "nothing is listed again"
    assert summary["sha256"] == hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "job.json":
            assert b"that-is-secret" not in path.read_bytes(), path
