"""Manifests: what is written is read again, what is none is named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import manifest
from pipeline.errors import ConfigError
from pipeline.manifest import Entry, Manifest

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
ENTRIES = st.builds(
    Entry,
    name=NAMES,
    size_bytes=st.none() | st.integers(0, 1 << 60),
    version=st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
    sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    documents=st.none() | st.integers(0, 1 << 40),
)


@settings(deadline=None)
@given(st.lists(ENTRIES, max_size=8, unique_by=lambda entry: entry.name))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "m.jsonl"
    manifest.write(path, entries)
    assert list(manifest.read(path).entries.values()) == entries
    assert path.read_bytes().count(b"\n") == len(entries)
    assert [one.name for one in path.parent.iterdir()] == ["m.jsonl"]


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), NAMES)
def test_a_shard_is_the_longest_end_that_has_an_entry(known: list[str], name: str) -> None:
    parts = name.split("/")
    ends = ["/".join(parts[at:]) for at in range(len(parts))]
    expected = next((end for end in ends if end in known), None)
    found = Manifest([Entry(one) for one in known], "m").find(name)
    assert (found and found.name) == expected


def test_names_work_wherever_the_shards_lie() -> None:
    entries = Manifest([Entry("b.tar", 1), Entry("a/b.tar", 2), Entry("s3://x/b.tar", 3)], "m")
    found = {
        name: entry and entry.size_bytes
        for name in ("file:///d/b.tar", "https://h/z/a/b.tar", "s3://x/b.tar", "s3://x/ab.tar")
        for entry in [entries.find(name)]
    }
    assert list(found.values()) == [1, 2, 3, None]


@pytest.mark.parametrize("line", [
    "{", "[]", "{}", '{"name": ""}', '{"name": "a", "size_bytes": -1}',
    '{"name": "a", "sha256": "ABC"}', '{"name": "a", "sha-256": "0"}', '{"name": "\udcff"}',
])  # fmt: skip
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"name": "first"}\n\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ConfigError, match=r"m.jsonl, line 3: "):
        manifest.read(path)


def test_a_manifest_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        manifest.read(tmp_path / "none.jsonl")
    (tmp_path / "m.jsonl").write_text('{"name":"a"}\n{"name":"a"}\n')
    with pytest.raises(ConfigError, match="a stands there twice"):
        manifest.read(tmp_path / "m.jsonl")
