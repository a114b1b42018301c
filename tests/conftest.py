"""Fixtures that several modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import sources
from tests.fetched import DATA, NAME
from tests.servers import Behaviour, http_server


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between attempts are a hundredth of what they are in production."""
    monkeypatch.setattr(sources, "_FIRST_WAIT_S", 0.002)


@pytest.fixture
def served(tmp_path: Path, short_waits: None) -> Iterator[tuple[str, Behaviour, Path]]:
    """A file server with one shard: URL, behaviour, folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    how = Behaviour(etag={NAME: '"one"'})
    with http_server(folder, how) as url:
        yield url, how, folder
