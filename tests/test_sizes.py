"""Stage sizes follow measured costs; costs are measured once, on the format that is streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import costs, encoding, sizes
from pipeline.config import Stream
from pipeline.costs import Costs

SECONDS = st.floats(1e-4, 1.0)


@given(st.integers(1, 128), SECONDS, SECONDS)
def test_no_stage_is_slower_than_all_processors_together(
    cpus: int, read_s: float, encode_s: float
) -> None:
    split = sizes.split(cpus, "tokenize", Stream(), Costs(read_s, encode_s))
    ideal = cpus / (read_s + encode_s)  # MB/s with every processor busy
    assert split.decompressors / read_s >= ideal * (1 - 1e-9)
    assert split.tokenizers / encode_s >= ideal * (1 - 1e-9)
    assert split.decompressors + split.tokenizers <= cpus + 1


@given(st.integers(1, 64), st.integers(1, 64), SECONDS, SECONDS)
def test_what_is_asked_for_is_taken(n: int, cpus: int, read_s: float, encode_s: float) -> None:
    cost = Costs(read_s, encode_s)
    split = sizes.split(cpus, "train", Stream(workers=n), cost)
    assert split.tokenizers == n
    assert 1 <= split.decompressors <= max(1, cpus)
    chosen = sizes.split(cpus, "train", Stream(workers=n, decompressors=3, fetchers=5), cost)
    assert (chosen.decompressors, chosen.fetchers) == (3, 5)
    auto = sizes.split(cpus, "train", Stream(), cost)
    assert auto.decompressors + auto.tokenizers <= max(1, cpus - 1) + 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("s3://b/shard-00001.tar.bz2", "tar.bz2"),
        ("x/a.tgz", "tar.gz"),
        ("000_00000.parquet", "parquet"),
        ("https://h/part.7.jsonl.zst", "jsonl.zst"),
        ("plain.jsonl", "jsonl"),
        ("part.json.gz", "jsonl.gz"),
        ("nothing", "jsonl"),
    ],
)
def test_a_format_is_told_by_the_name_and_can_be_measured(name: str, form: str) -> None:
    assert costs.form_of(name) == form
    cost = costs.measure(form, encoding.load("gpt2", None))
    assert cost.read_s > 0 < cost.encode_s


def test_costs_are_measured_once_and_a_damaged_note_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loads: list[int] = []

    def load() -> encoding.Encoder:
        loads.append(1)
        return encoding.load("gpt2", None)

    first = costs.of("x.jsonl.gz", load, "gpt2")
    assert costs.of("x.jsonl.gz", load, "gpt2") == first
    assert len(loads) == 1
    (note,) = (tmp_path / "cache").rglob("costs.json")
    note.write_bytes(b"{")
    again = costs.of("x.jsonl.gz", load, "gpt2")
    assert again.read_s > 0
    assert len(loads) == 2
    assert note.read_bytes() != b"{"


def test_gpt2s_ranks_are_kept_and_a_damaged_copy_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ranks = encoding._read_gpt2_ranks()
    assert encoding._gpt2_ranks() == ranks  # read out of the package, and kept
    assert encoding._gpt2_ranks() == ranks  # the copy
    (kept,) = tmp_path.rglob("gpt2-*.bin")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    assert encoding._gpt2_ranks() == ranks
    assert encoding.vocabulary("gpt2", None) == (len(ranks) + 1, len(ranks))
    assert encoding.load("gpt2", 1000).eot == encoding.vocabulary("gpt2", 1000).eot == 999
