"""`where` against what real runs have trained on: the batch is built again from its answer, with
tiktoken and the shards' own lines, and must have the hash that the trainer logged."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiktoken
import zstandard
from click.testing import CliRunner

from pipeline import cache, encoding
from pipeline.cli import cli
from pipeline.errors import BudgetError, CacheInUseError, ConfigError, ShardError, SourceError
from pipeline.where import Answer, Request, find
from tests.harness import english, job, run
from tests.servers import Behaviour, http_server
from tests.training_jobs import SECTIONS, STREAM, steps_of

DOCUMENTS = english(36, largest=6000)
SIZES = (4, 9, 2, 11, 10)
VOCAB = SECTIONS["tokenizer"]["vocab_size"]
T = 64


class Ran(NamedTuple):
    """A run that has ended: its folder, the server its shards came from, every shard's lines."""

    run_dir: Path
    server: Behaviour
    lines: dict[str, list[bytes]]
    hashes: dict[int, str]

    def request(self, step: int, **changes: Any) -> Request:
        return Request(self.run_dir, step, **changes)

    def forget(self) -> None:
        """Leave no shard in the cache."""
        for path in (self.run_dir.parent / "cache").glob("*.shard"):
            path.unlink()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A run over five shards twice, to the end of the stream. One of them is cut off, every fifth
    record is bad, and a tenth of the documents is held out."""
    shards, folder = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("ran")
    lines, at = {}, 0
    for number, size in enumerate(SIZES):
        name = f"s{number}.jsonl.zst"
        lines[name] = _lines(range(at, at + size))
        data = b"".join(zstandard.compress(line + b"\n") for line in lines[name])
        (shards / name).write_bytes(data[:-40] if number == 3 else data)
        at += size
    behaviour = Behaviour()
    with http_server(shards, behaviour) as url:
        hyper = {**SECTIONS["training"]["hyperparameters"], "iters": 10_000}
        stream = STREAM | {"epochs": 2, "max_bad_shards": 9, "block_bytes": 4096, "max_retries": 1,
                           "cache_dir": str(folder / "cache")}  # fmt: skip
        logs = {"logging": {**SECTIONS["logging"], "max_log_mb": 4}}
        validation = {"share": 0.1, "tokens": 500}
        changes = SECTIONS | {"training": {"hyperparameters": hyper}} | stream | logs
        urls = [f"{url}/{name}" for name in lines]
        one = job(folder, urls, kind="train", validation=validation, **changes)
        summary = run(folder, one)
        assert summary["stream_ended"]
        assert summary["bad_records"] > 3
        hashes = {step: said[0] for step, said in steps_of(folder).items()}
        yield Ran(folder / "run", behaviour, lines, hashes)


def _lines(numbers: range) -> list[bytes]:
    lines = []
    for number in numbers:
        lines += [b"not json"] * (number % 5 == 0)
        lines.append(json.dumps({"text": DOCUMENTS[number], "id": f"doc-{number}"}).encode())
    return lines


def rebuilt(answer: Answer, lines: dict[str, list[bytes]]) -> str:
    """The hash of the batch that an answer describes."""
    full = encoding.whole("gpt2")
    ranks = {token: rank for token, rank in full._mergeable_ranks.items() if rank < VOCAB - 1}
    plain = tiktoken.Encoding("cut", pat_str=full._pat_str, mergeable_ranks=ranks,
                              special_tokens={})  # fmt: skip
    digests = []
    for row in answer.rows:
        at, window = 0, b""
        for part in row.documents:
            record = json.loads(lines[part.shard.rsplit("/", 1)[-1]][part.record])
            assert part.id == record["id"]
            ids = plain.encode_ordinary(record["text"])
            ends = [0, *itertools.accumulate(len(plain.decode_single_token_bytes(i)) for i in ids)]
            tokens = ids[ends.index(part.bytes[0]) : ends.index(part.bytes[1])]
            if len(tokens) < part.tokens[1] - part.tokens[0]:
                assert part.bytes[0] == 0
                tokens = [VOCAB - 1, *tokens]
            assert part.tokens == (at, at + len(tokens))
            window += np.array(tokens, np.uint16).tobytes()
            at += len(tokens)
        assert at == T + 1
        digests.append(hashlib.sha256(window).digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_the_answer_is_the_batch(ran: Ran) -> None:
    """From the beginning, across epochs and a skipped shard, from a checkpoint, and where lanes
    have ended; with an empty cache, and with one that holds what was fetched before."""
    ran.forget()
    last = max(ran.hashes)
    shards, epochs, starts = set(), set(), set()
    for step in (1, *(last * n // 6 for n in range(1, 6)), last):
        answer = find(ran.request(step))
        assert answer.verified
        assert rebuilt(answer, ran.lines) == ran.hashes[step] == answer.batch_hash
        assert len(answer.rows) == 8
        starts.add(answer.from_step)
        shards |= {one.shard for row in answer.rows for one in row.documents}
        epochs |= {one.epoch for row in answer.rows for one in row.documents}
    assert len({row.lane for row in answer.rows}) < 3, "no lane had ended before the others"
    assert len(shards) == 3, "one shard is cut off, and of one all documents are held out"
    assert epochs == {0, 1}
    assert 0 in starts and max(starts) > 0


def test_a_row_as_lines_and_as_json(ran: Ran) -> None:
    arguments = ["where", "--run", str(ran.run_dir), "--step", "9", "--row", "3"]
    said = CliRunner().invoke(cli, [*arguments, "--json"], catch_exceptions=False)
    answer = json.loads(said.stdout)
    assert answer["verified"] is True
    assert [row["row"] for row in answer["rows"]] == [3]
    lines = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    for document in answer["rows"][0]["documents"]:
        assert f"{document['shard']} record {document['record']} " in lines
        assert document["id"] in lines


@pytest.mark.parametrize(("step", "row", "what"), [(10_000, None, "has come to update"),
                                                   (3, 8, "has 8 rows")])  # fmt: skip
def test_what_the_run_does_not_have(ran: Ran, step: int, row: int | None, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        find(ran.request(step, row=row))


def test_a_shard_that_cannot_be_had_again_is_named(ran: Ran) -> None:
    ran.forget()
    with pytest.raises(BudgetError, match=r"s\d\.jsonl\.zst .* do not fit"):
        find(ran.request(2, max_disk_gb=(_bytes(ran.run_dir) + 2000) / 1e9))
    ran.server.status["s0.jsonl.zst"] = ran.server.status["s1.jsonl.zst"] = [404] * 2
    try:
        with pytest.raises(SourceError, match=r"s[01]\.jsonl\.zst"):
            find(ran.request(len(ran.hashes) // 2))
    finally:
        ran.server.status.clear()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_another_batch_than_was_logged_is_an_error(ran: Ran) -> None:
    path = ran.run_dir / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept.replace(ran.hashes[5], "0" * 16))
    try:
        with pytest.raises(ShardError, match="has logged 0000"):
            find(ran.request(5))
    finally:
        path.write_text(kept)


def test_of_a_run_that_goes_on_its_cache_is_left_alone(ran: Ran, tmp_path: Path) -> None:
    """The error says what to do, and that works."""
    with cache.own(ran.run_dir.parent / "cache"):
        before = sorted((ran.run_dir.parent / "cache").iterdir())
        with pytest.raises(CacheInUseError, match="belongs to a run that is going on") as caught:
            find(ran.request(2))
        assert "--cache-dir" in caught.value.remedy
        answer = find(ran.request(2, cache_dir=str(tmp_path / "own")))
        assert answer.verified
        assert sorted((ran.run_dir.parent / "cache").iterdir()) == before
