"""The whole pipeline without a trainer: one stream whatever happens to it."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import encoding
from pipeline.workers.writer import HEADER_BYTES
from tests.harness import (
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

DOCUMENTS = english(260)
SHARDS = 7
FORMS = ["tar.bz2", "jsonl.zst", "parquet"]


def reference(documents: list[str]) -> np.ndarray:
    """What `tokenize` must give: every document on its own, behind an end-of-text token."""
    gpt2 = encoding.load("gpt2", None)
    plain = encoding.whole("gpt2")
    ids: list[int] = []
    for document in documents:
        ids.append(gpt2.eot)
        ids += plain.encode_ordinary(document)
    return np.array(ids, np.uint16)


@pytest.fixture(scope="module")
def expected() -> str:
    return hashlib.sha256(reference(DOCUMENTS).astype("<u2").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("shards")
    return {form: write_shards(folder / form, DOCUMENTS, SHARDS, form) for form in FORMS}


@pytest.mark.parametrize(
    ("form", "workers", "decompressors"),
    [
        ("tar.bz2", 1, 1), ("tar.bz2", 2, 2), ("tar.bz2", 4, 1),
        ("jsonl.zst", 1, 2), ("jsonl.zst", 4, 2),
        ("parquet", 2, 1), ("parquet", 4, 2),
    ],
)  # fmt: skip
def test_the_stream_is_the_reference_for_any_workers_and_format(
    tmp_path: Path,
    shards: dict[str, list[Path]],
    expected: str,
    form: str,
    workers: int,
    decompressors: int,
) -> None:
    summary = run(
        tmp_path,
        job(tmp_path, shards[form], workers=workers, decompressors=decompressors),
    )
    assert summary["sha256"] == expected
    assert summary["documents"] == len(DOCUMENTS)
    assert summary["text_bytes"] == sum(len(d.encode()) for d in DOCUMENTS)
    assert summary["shards"] == SHARDS
    assert summary["restarts"] == 0


def test_files_hold_the_stream(tmp_path: Path, shards: dict[str, list[Path]]) -> None:
    summary = run(tmp_path, job(tmp_path, shards["jsonl.zst"], file_tokens=30_000))
    paths = sorted((tmp_path / "run").glob("tokens_*.bin"))
    assert len(paths) == -(-summary["tokens"] // 30_000) > 2
    tokens = np.concatenate([np.fromfile(p, "<u2", offset=HEADER_BYTES) for p in paths])
    np.testing.assert_array_equal(tokens, reference(DOCUMENTS))


def test_a_limit_ends_the_stream_early(tmp_path: Path, shards: dict[str, list[Path]]) -> None:
    summary = run(tmp_path, job(tmp_path, shards["parquet"], limit_tokens=12_345))
    assert summary["tokens"] == 12_345
    expected = hashlib.sha256(reference(DOCUMENTS)[:12_345].tobytes()).hexdigest()
    assert summary["sha256"] == expected


def test_lanes_take_turns_window_by_window(tmp_path: Path, shards: dict[str, list[Path]]) -> None:
    """Three lanes against an independent interleaving of their three streams."""
    summary = run(tmp_path, job(tmp_path, shards["jsonl.zst"], lanes=3, workers=2))
    per = -(-len(DOCUMENTS) // SHARDS)
    texts = [DOCUMENTS[at : at + per] for at in range(0, len(DOCUMENTS), per)]
    loads, lanes = [0, 0, 0], [[], [], []]
    for path, part in zip(shards["jsonl.zst"], texts, strict=True):
        lane = loads.index(min(loads))
        loads[lane] += path.stat().st_size
        lanes[lane] += part
    streams = [reference(part) for part in lanes]
    rounds = range(0, max(map(len, streams)), 64)
    mixed = np.concatenate([stream[at : at + 64] for at in rounds for stream in streams])
    assert summary["sha256"] == hashlib.sha256(mixed.tobytes()).hexdigest()


def test_a_killed_supervisor_leaves_nothing_and_the_next_start_goes_on(
    tmp_path: Path, shards: dict[str, list[Path]], expected: str
) -> None:
    one = job(tmp_path, shards["tar.bz2"], workers=2)
    process = start(
        tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:30:{tmp_path / 'stopped'}"
    )
    for _ in wait_for_event(process, "consumer_ready"):
        pass
    children = descendants(process.pid)
    assert len(children) >= 5
    process.kill()
    process.wait(10)
    writer = [c for c in children if c.is_running() and c.status() == psutil.STATUS_STOPPED]
    for stopped in writer:  # a stopped process cannot see the hang-up
        os.kill(stopped.pid, signal.SIGCONT)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    summary = run(tmp_path, one)
    assert summary["sha256"] == expected


def test_stop_and_resume_at_the_exact_token(
    tmp_path: Path, shards: dict[str, list[Path]], expected: str
) -> None:
    """SIGINT: a clean stop with the code that says so; the same command goes on."""
    one = job(tmp_path, shards["tar.bz2"])
    process = start(
        tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:5:{tmp_path / 'stopped'}"
    )
    for _ in wait_for_event(process, "consumer_ready"):
        pass
    deadline = psutil.time.time() + 30
    stopped = []
    while not stopped and psutil.time.time() < deadline:
        stopped = [c for c in descendants(process.pid) if c.status() == psutil.STATUS_STOPPED]
    process.send_signal(signal.SIGINT)
    for _ in wait_for_event(process, "stopping"):
        pass
    os.kill(stopped[0].pid, signal.SIGCONT)
    outcome, err = finish(process)
    assert process.returncode == 75, err
    assert 0 < outcome["summary"]["tokens"] < len(reference(DOCUMENTS))
    summary = run(tmp_path, one)
    assert summary["sha256"] == expected
    assert summary["documents"] == len(DOCUMENTS)
    assert summary["text_bytes"] == sum(len(d.encode()) for d in DOCUMENTS)
    assert summary["shards"] == SHARDS
    again = run(tmp_path, one)
    assert (again["sha256"], again["tokens"]) == (expected, summary["tokens"])


def test_a_second_run_on_the_same_cache_is_refused(
    tmp_path: Path, shards: dict[str, list[Path]]
) -> None:
    one = job(tmp_path, shards["tar.bz2"])
    process = start(
        tmp_path, one, FINEWEB_FAULT=f"stop:writer:writer:after_write:5:{tmp_path / 'stopped'}"
    )
    for _ in wait_for_event(process, "consumer_ready"):
        pass
    second, _ = finish(start(tmp_path / "second", one))
    assert str(process.pid) in second["what"]
    process.kill()
    process.communicate()


def test_a_checkpoint_of_another_stream_is_refused(
    tmp_path: Path, shards: dict[str, list[Path]]
) -> None:
    run(tmp_path, job(tmp_path, shards["jsonl.zst"]))
    process = start(tmp_path, job(tmp_path, shards["jsonl.zst"], block_bytes=50_000))
    outcome, _ = finish(process)
    assert process.returncode == 2
    assert "data.stream.block_bytes: 40000 then, 50000 now" in outcome["what"]
    assert "--fresh" in outcome["remedy"]


def test_a_block_that_kills_three_tokenizers_ends_the_run_by_name(
    tmp_path: Path, shards: dict[str, list[Path]]
) -> None:
    plans = ";".join(
        f"kill:tokenizer:tokenizer:before_encode:1:{tmp_path / f'fired-{n}'}" for n in range(3)
    )
    process = start(tmp_path, job(tmp_path, shards["jsonl.zst"], workers=1), FINEWEB_FAULT=plans)
    outcome, err = finish(process)
    assert process.returncode == 3, err
    assert "shard-00000.jsonl.zst" in outcome["what"]
    assert "block 0 has killed 3 tokenizers" in outcome["what"]
    assert len(events(err, "worker_died")) == 3
