"""Malformed shards: each has the outcome that its row in tests/malformed.py says."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.blocks import blocks
from pipeline.codecs import open_documents
from pipeline.encoding import safe_cut
from pipeline.errors import ShardError
from pipeline.messages import BadRecord
from pipeline.supervisor import Job
from tests.bombs import BOMBS, EXPANDED_BYTES
from tests.corpus.base import TEXTS, Case
from tests.harness import (
    ROOT,
    DiskWatcher,
    descendants,
    english,
    events,
    finish,
    job,
    run,
    start,
    wait_for_event,
    write_shards,
)
from tests.malformed import CASES, documents
from tests.servers import Behaviour, http_server
from tests.test_pipeline import reference


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
        for document in documents(path, case.name):
            if isinstance(document, bytes):
                texts.append(document.decode())
            else:
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


# ── memory ──────────────────────────────────────────────────────────────────────────────────

_MOST_BYTES = 350_000_000  # what reading may add to a process's memory: far below EXPANDED_BYTES


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_read_in_bounded_memory(name: str) -> None:
    """It holds one document behind a line, member or dictionary of half a gigabyte or more."""
    assert EXPANDED_BYTES > 1.5 * _MOST_BYTES
    command = [sys.executable, "-m", "tests.bombs", name]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["documents"], said["bad"], said["error"]) == (*BOMBS[name][1:], "")
    assert said["peak_bytes"] - said["before_bytes"] < _MOST_BYTES
    assert said["files"] == 1, "something was written beside it"
    assert said["file_bytes"] < EXPANDED_BYTES / 100


# ── whole runs ──────────────────────────────────────────────────────────────────────────────


def sha256(texts: list[str]) -> str:
    return hashlib.sha256(reference(texts).tobytes()).hexdigest()


def read_all(path: Path, name: str, block_bytes: int) -> tuple[list[str], int, bool]:
    """Texts and bad records of the blocks that are whole, and whether the shard ends in an error:
    then what comes behind its last whole block is left out."""
    texts: list[bytes] = []
    bad = 0
    found = open_documents(str(path), name, "text")
    rule: Any = {"block_bytes": block_bytes, "max_documents": block_bytes // 64}
    try:
        for block in blocks(found, cut=safe_cut("gpt2"), **rule):
            raw = b"".join(bytes(piece) for piece in block.pieces)
            ends = itertools.accumulate(block.lengths, initial=0)
            pieces = [raw[start:end] for start, end in itertools.pairwise(ends)]
            if block.continues:
                texts[-1] += pieces.pop(0)
            texts += pieces
            bad += block.num_bad
    except ShardError:
        return [text.decode() for text in texts], bad, True
    return [text.decode() for text in texts], bad, False


def test_a_run_skips_what_it_may_and_counts_it(tmp_path: Path) -> None:
    """Every tenth case and a bomb, in one run: what it gives, skips and says."""
    chosen = [*CASES[::10], next(case for case in CASES if "10000000000" in case.title)]
    shards = tmp_path / "shards"
    shards.mkdir()
    texts: list[str] = []
    bad = failing = 0
    for number, case in enumerate(chosen):
        path = shards / f"{number:03d}-{case.name}"
        path.write_bytes(case.make())
        got = read_all(path, path.name, 4096)
        texts, bad, failing = texts + got[0], bad + got[1], failing + got[2]
    bomb = shards / "999-x.jsonl.gz"
    bomb.write_bytes(BOMBS["x.jsonl.gz"][0]())
    assert failing >= 12
    assert bad >= 1
    with DiskWatcher(tmp_path / "run", tmp_path / "cache") as watcher:
        process = start(tmp_path, job(tmp_path, [shards], max_bad_shards=failing, block_bytes=4096))
        outcome, err = finish(process)
    assert process.returncode == 0, outcome
    summary = outcome["summary"]
    assert summary["sha256"] == sha256([*texts, "sound"])
    assert summary["bad_records"] == bad + 1
    assert len(events(err, "shard_skipped")) == failing
    lines = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert len(lines) == bad + 1
    assert all({"shard", "place", "reason"} <= set(json.loads(line)) for line in lines)
    assert watcher.peak_bytes < 20_000_000
    process = start(tmp_path / "few", job(tmp_path / "few", [shards], max_bad_shards=failing - 1))
    outcome, err = finish(process)
    assert process.returncode == 3, err
    assert f"(--max-bad-shards is {failing - 1})" in outcome["remedy"]


DOCUMENTS = english(100)


def test_a_resume_makes_the_same_choice(tmp_path: Path) -> None:
    """Stopped before a skip that is known already: the stream goes on as if it had not been, also
    when what was bad has healed in between (the server says the same size and version)."""
    folder = tmp_path / "served"
    paths = write_shards(folder, DOCUMENTS, 4, "parquet")
    sound = paths[1].read_bytes()
    group = pq.ParquetFile(paths[1]).metadata.row_group(1)
    at = group.column(1).dictionary_page_offset + 1000
    how = Behaviour(etag={path.name: f'"{path.name}"' for path in paths})

    def one(name: str) -> Job:
        pattern = f"{url}/shard-{{00000..00003}}.parquet"
        return job(tmp_path / name, [pattern], max_bad_shards=1, prefetch=1)

    with http_server(folder, how) as url:
        paths[1].write_bytes(sound[:at] + bytes(99) + sound[at + 99 :])
        whole = run(tmp_path / "whole", one("whole"))
        plan = f"stop:writer:writer:after_write:250:{tmp_path / 'stopped'}"
        process = start(tmp_path / "cut", one("cut"), FINEWEB_FAULT=plan)
        seen = list(wait_for_event(process, "shard_skipped"))
        assert "damaged or cut off" in seen[-1]
        stopped: list[psutil.Process] = []
        while not stopped:
            children = descendants(process.pid)
            stopped = [one for one in children if one.status() == psutil.STATUS_STOPPED]
        process.send_signal(signal.SIGINT)
        list(wait_for_event(process, "stopping"))
        os.kill(stopped[0].pid, signal.SIGCONT)
        outcome, err = finish(process)
        assert process.returncode == 75, err
        assert 0 < outcome["summary"]["tokens"] < whole["tokens"]
        state = json.loads((tmp_path / "cut" / "run" / "writer.json").read_text())
        (skip,), (lane,) = state["cursor"]["skips"], state["cursor"]["lanes"]
        assert (lane["sequence"], lane["block"]) < (skip["sequence"], skip["block"])
        assert skip["block"] > 1, "the blocks before it must still be read"
        shutil.copytree(tmp_path / "cut", tmp_path / "healed")
        resumed = run(tmp_path / "cut", one("cut"))
        paths[1].write_bytes(sound)
        shutil.rmtree(tmp_path / "healed" / "cache")
        healed = run(tmp_path / "healed", one("healed"))
    for summary in (resumed, healed):
        assert summary["sha256"] == whole["sha256"]
        assert summary["documents"] == whole["documents"] < len(DOCUMENTS)
