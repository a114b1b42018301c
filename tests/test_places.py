"""Where shards lie: stores that list, manifests, what a run keeps, proxies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import catalog, manifest
from pipeline.errors import ConfigError, FinewebError, SourceError
from pipeline.manifest import Entry, Manifest
from tests.fetched import DATA, NAME, OPTIONS, Fetched
from tests.harness import english, events, finish, job, run, start, write_shards
from tests.proxy import fault_proxy
from tests.servers import Behaviour, http_server, s3_server
from tests.stores import store_server
from tests.test_pipeline import reference

OBJECTS = {NAME: DATA, "a/1.tar": b"1", "a/2.tar": b"22", "a/b/3.tar": b"333", "README.md": b"x"}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server("bucket", OBJECTS) as variables:
        yield variables


@pytest.fixture(scope="module")
def other_stores() -> Iterator[str]:
    with store_server("bucket", OBJECTS) as url:
        yield url


@pytest.fixture(params=["s3", "gs", "az"])
def store(
    request: pytest.FixtureRequest, s3: dict[str, str], other_stores: str,
    monkeypatch: pytest.MonkeyPatch, short_waits: None,
) -> str:  # fmt: skip
    """The address of a bucket, and the environment that leads to it."""
    variables = {
        "s3": s3,
        "gs": {"GOOGLE_BASE_URL": other_stores, "GOOGLE_SKIP_SIGNATURE": "true"},
        "az": {"AZURE_STORAGE_ENDPOINT": other_stores, "AZURE_SKIP_SIGNATURE": "true",
               "AZURE_STORAGE_ACCOUNT_NAME": "account"},
    }  # fmt: skip
    for key, value in variables[request.param].items():
        monkeypatch.setenv(key, value)
    return f"{request.param}://bucket"


@pytest.mark.parametrize(("pattern", "keys"), [
    ("a/*.tar", ["a/1.tar", "a/2.tar"]), ("a/", ["a/1.tar", "a/2.tar"]), ("", [NAME]),
    ("**/*.tar", ["a/1.tar", "a/2.tar", "a/b/3.tar"]), ("a/{2,1}.tar", ["a/2.tar", "a/1.tar"]),
    ("a/?.tar", ["a/1.tar", "a/2.tar"]),
])  # fmt: skip
def test_stores_list(store: str, pattern: str, keys: list[str]) -> None:
    found = catalog.build([f"{store}/{pattern}"], OPTIONS)
    assert [shard.name for shard in found] == [f"{store}/{key}" for key in keys]
    assert [shard.size_bytes for shard in found] == [len(OBJECTS[key]) for key in keys]
    (listed,), (asked,) = (
        catalog.build([f"{store}/{one}"], OPTIONS) for one in ("a/1*", "a/1.tar")
    )
    assert listed.key == asked.key, "a listing says the same version as the object"


def test_a_store_is_fetched_from(tmp_path: Path, store: str) -> None:
    Fetched(tmp_path / "cache", f"{store}/{NAME}").ok()


@pytest.mark.parametrize(("bucket", "pattern", "what"), [
    ("bucket", "none.tar", "none.tar does not exist"), ("bucket", "a/*.bin", "nothing matches"),
    ("bukcet", "a/*.tar", "there is no such"), ("bukcet", "a/1.tar", "there is no such"),
])  # fmt: skip
def test_what_a_store_does_not_have_is_said(
    store: str, bucket: str, pattern: str, what: str
) -> None:
    with pytest.raises(FinewebError) as caught:
        catalog.build([f"{store.removesuffix('bucket')}{bucket}/{pattern}"], OPTIONS)
    assert what in str(caught.value)
    assert caught.value.remedy


def test_lists_and_folders_of_this_disk(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", ".hidden", "manifest.jsonl", "in/c.tar"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"x")
    (tmp_path / "list").write_text(f"# ours\n{tmp_path}/d/in/*\n\n  {tmp_path}/d  \n")
    found = catalog.build([f"@{tmp_path}/list"], OPTIONS)
    assert [Path(shard.name).name for shard in found] == ["c.tar", "a.tar", "b.tar"]
    (tmp_path / "other").write_text("@list")
    for wrong, what in (("@none", "No such file"), (f"@{tmp_path}/other", "another list")):
        with pytest.raises(ConfigError, match=what):
            catalog.build([wrong], OPTIONS)
    with pytest.raises(ConfigError, match="named twice"):
        catalog.build([f"{tmp_path}/d", f"{tmp_path}/d/a.tar"], OPTIONS)
    with pytest.raises(ConfigError, match="does not list"):
        catalog.build(["http://host/*.tar"], OPTIONS)


def test_a_manifest_is_enforced(tmp_path: Path, served: tuple[str, Behaviour, Path]) -> None:
    url, digest = f"{served[0]}/{NAME}", hashlib.sha256(DATA).hexdigest()

    def build(*entries: Entry) -> catalog.Shard:
        known = catalog.Known(Manifest(entries, "m"))
        return catalog.build([url], OPTIONS, known)[0]

    assert build(Entry(NAME, len(DATA), sha256=digest)).sha256 == digest
    with pytest.raises(ConfigError, match="does not stand in the manifest m"):
        build(Entry("other.bin"))
    with pytest.raises(SourceError, match="300000 bytes, and 5 in the manifest"):
        build(Entry(NAME, 5))
    with pytest.raises(SourceError, match="another version"):
        build(Entry(NAME, version='"two"'))


DOCUMENTS = english(60)
SHA256 = hashlib.sha256(reference(DOCUMENTS).tobytes()).hexdigest()


def test_a_run_keeps_what_it_found_and_a_wrong_digest_loses_nothing(tmp_path: Path) -> None:
    paths, how = write_shards(tmp_path / "served", DOCUMENTS, 3), Behaviour()
    good = [Entry(one.name, sha256=hashlib.sha256(one.read_bytes()).hexdigest()) for one in paths]
    bad = [good[0], Entry(good[1].name, sha256="0" * 64), good[2]]
    for name, entries in (("good", good), ("bad", bad)):
        manifest.write(tmp_path / name, entries)
    with http_server(tmp_path / "served", how) as url:
        shards = [f"{url}/shard-{{00000..00002}}.tar.bz2"]
        process = start(tmp_path, job(tmp_path, shards, manifest=str(tmp_path / "bad")))
        outcome, err = finish(process)
        assert process.returncode == 5, err
        assert f"{paths[1].name} has the SHA-256 {good[1].sha256}, and should" in outcome["what"]
        how.queries.clear()
        how.requests.clear()
        process = start(tmp_path, job(tmp_path, shards, manifest=str(tmp_path / "good")))
        outcome, err = finish(process)
    assert outcome["summary"]["sha256"] == SHA256
    assert events(err, "shards_listed")[0]["known_from_before"] is True
    assert len(how.queries) == sum(how.requests.values()), "nothing but the shards is asked for"
    local = job(tmp_path / "local", paths, manifest=str(tmp_path / "bad"))
    process = start(tmp_path / "local", local)
    outcome, _ = finish(process)
    assert process.returncode == 3
    assert "and should have 000" in outcome["what"]


def test_proxies_are_used_and_kept_from(
    tmp_path: Path, served: tuple[str, Behaviour, Path], monkeypatch: pytest.MonkeyPatch,
    other_stores: str,
) -> None:  # fmt: skip
    """For the web and for stores; by scheme, and not where NO_PROXY says so."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name, upstream, address in (
        ("web", served[0], f"http://somewhere.invalid/{NAME}"),
        ("store", other_stores, f"gs://bucket/{NAME}"),
    ):
        with fault_proxy(upstream) as proxy, monkeypatch.context() as patch:
            patch.setenv("GOOGLE_BASE_URL", "http://store.invalid")
            patch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
            patch.setenv("HTTP_PROXY", proxy.url)
            Fetched(tmp_path / name, address).ok()
            assert proxy.requests
            patch.setenv("NO_PROXY", "invalid")
            with pytest.raises(SourceError):
                catalog.build([address], OPTIONS)
            patch.delenv("NO_PROXY")
            patch.delenv("HTTP_PROXY")
            patch.setenv("HTTPS_PROXY", proxy.url)  # of the other scheme
            with pytest.raises(SourceError):
                catalog.build([address], OPTIONS)
    with monkeypatch.context() as patch, fault_proxy(served[0]) as proxy:
        patch.setenv("HTTP_PROXY", proxy.url)
        patch.setenv("NO_PROXY", "127.0.0.1")
        Fetched(tmp_path / "direct", f"{served[0]}/{NAME}").ok()
        assert not proxy.requests


def test_a_run_from_a_store(tmp_path: Path, s3: dict[str, str]) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id="x", aws_secret_access_key="x")  # fmt: skip
    for path in write_shards(tmp_path / "made", DOCUMENTS, 3, "parquet"):
        client.put_object(Bucket="bucket", Key=f"run/{path.name}", Body=path.read_bytes())
    assert run(tmp_path, job(tmp_path, ["s3://bucket/run/*"]), **s3)["sha256"] == SHA256
