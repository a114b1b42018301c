"""Malformed shards: each has the outcome that its row in tests/malformed.py says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.errors import ShardError
from pipeline.messages import BadRecord
from tests.malformed import CASES, TEXTS, Case


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60
    assert len({(case.title, case.name) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.title}, {case.name}")
def test_outcome(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.make())
    texts: list[str] = []
    bad: list[BadRecord] = []
    said = None
    try:
        for document in open_documents(str(path), case.name, "text"):
            match document:
                case bytes():
                    texts.append(document.decode())
                case Texts():
                    texts += [one.decode() for one in document.one_by_one()]
                case _:
                    bad.append(document)
    except ShardError as error:
        said = str(error)
        assert case.name in error.what
        assert error.remedy
    wanted = case.outcome
    assert (said is None) == (wanted.error is None), said
    if wanted.error is None:
        assert texts == TEXTS[: wanted.documents]
    else:
        assert wanted.error in str(said)
        assert texts == TEXTS[: len(texts)]
        assert len(texts) <= wanted.documents
    assert len(bad) == wanted.bad, bad
    for record in bad:
        assert record.place
        assert wanted.reason in record.reason
        assert (record.place + record.reason).isprintable()
