"""Globs over paths: as Python's own, which are made for a disk."""

from __future__ import annotations

import fnmatch
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.globs import Glob, may_be_shard

PARTS = st.text("ab.", min_size=1, max_size=3).filter(lambda part: part not in (".", ".."))
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
WILD = st.lists(st.sampled_from(["a", "b", ".", "*", "?", "[ab]", "[!a]", "[a-b]"]),
                min_size=1, max_size=4).map("".join)  # fmt: skip
PATTERNS = st.lists(WILD | st.just("**"), min_size=1, max_size=4)


def reference(pattern: list[str], path: list[str]) -> bool:
    """Part by part, with the standard library's matcher of one name."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(
            reference(rest, path[at:]) and not any(part.startswith(".") for part in path[:at])
            for at in range(len(path))
        )
    if not path or (path[0].startswith(".") and pattern[0][0] in "*?["):
        return False
    return fnmatch.fnmatchcase(path[0], pattern[0]) and reference(pattern[1:], path[1:])


@settings(deadline=None)
@given(PATTERNS, PATHS)
def test_a_glob_matches_what_the_shell_would(pattern: list[str], path: str) -> None:
    glob = Glob("/".join(pattern))
    matches = glob.matches(path)
    assert matches == reference(pattern, path.split("/"))
    if matches:  # a listing of the folder finds it
        folder = PurePosixPath(glob.folder)
        assert folder in PurePosixPath(path).parents
        assert glob.deep or PurePosixPath(path).parent == folder


@pytest.mark.parametrize(("pattern", "folder", "deep"), [
    ("data/*.parquet", "data", False), ("*.bin", "", False), ("a/b*/c.bin", "a", True),
    ("a/**", "a", True), ("a/**/x", "a", True), ("a/b/c", "a/b", False),
])  # fmt: skip
def test_only_the_folder_that_is_sure_is_listed(pattern: str, folder: str, deep: bool) -> None:
    glob = Glob(pattern)
    assert (glob.folder, glob.deep) == (folder, deep)


def test_a_folder_is_its_shards() -> None:
    names = ["x.tar", "x.jsonl.zst", ".hidden", "_SUCCESS", "README.md", "manifest.jsonl", "a/b"]
    for folder in ("", "data", "data/"):
        at = "data/" if folder else ""
        glob = Glob.of_folder(folder)
        assert [name for name in names if glob.matches(at + name)] == ["x.tar", "x.jsonl.zst"]
        assert not glob.matches("other/x.tar")
    assert [name for name in names if may_be_shard(name)] == ["x.tar", "x.jsonl.zst", "a/b"]
