"""Validation: documents that training never sees, and what the model makes of them."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pipeline import checkpoints, encoding
from pipeline.workers import writer
from tests.harness import english, finish, job, run, start, write_shards
from tests.test_trainer_export import forward
from tests.test_training import SECTIONS, STREAM, final_weights, steps_of
from trainer import saved
from trainer.export import export

SHARE = 0.3
# pieces of some thousand bytes: many documents, none larger than a block
DOCUMENTS = [f"{number}: {text}" for number, text in enumerate(english(120, largest=3_000))]
HELD_OUT = [
    text for text in DOCUMENTS
    if xxhash.xxh3_64_intdigest(text.encode(), 0x5EED) < SHARE * 2**64
]  # fmt: skip
VOCAB = 600


def documents_of(path: Path) -> list[str]:
    """The documents of a token file."""
    encoder = encoding.load("gpt2", VOCAB)
    tokens = writer.read_tokens(path)
    starts = [*np.flatnonzero(tokens == encoder.eot).tolist(), len(tokens)]
    return [encoder.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]


@pytest.fixture(scope="module", params=["jsonl.zst", "parquet"])
def shards(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("shards"), DOCUMENTS, 4, request.param)


def test_the_two_sides_are_the_documents_and_share_none(tmp_path: Path, shards: list[Path]) -> None:
    sides = {}
    for held_out in (False, True):
        folder = tmp_path / str(held_out)
        one = job(folder, shards, held_out=held_out, validation={"share": SHARE},
                  tokenizer={"vocab_size": VOCAB})  # fmt: skip
        run(folder, one)
        sides[held_out] = documents_of(folder / "run" / writer.file_name(0))
    assert 20 < len(HELD_OUT) < 60
    assert sides[True] == HELD_OUT
    assert sides[False] == [text for text in DOCUMENTS if text not in set(HELD_OUT)]


def training(folder: Path, shards: list[Path], **changes: Any) -> Any:
    sections = {
        **SECTIONS,
        "logging": {
            "steps": {"checkpoint_interval": 7, "validation_interval": 10},
            "sample_prompt": "import",
            "sample_tokens": 8,
        },
    }
    given = {"validation": {"share": SHARE, "tokens": 1_000}, **changes}
    return job(folder, shards, kind="train", **sections, **STREAM, **given)


def looks(folder: Path) -> dict[int, dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = ("val_loss", "val_ppl", "val_bpb", "sample")
    return {one["step"]: {k: one[k] for k in keys} for one in records if "val_loss" in one}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trained")
    paths = write_shards(folder / "shards", DOCUMENTS, 4, "jsonl.zst")
    summary = run(folder, training(folder, paths))
    return folder, paths, summary


def test_the_loss_is_that_of_an_independent_forward_pass(trained: Any, tmp_path: Path) -> None:
    folder, _, summary = trained
    seen = looks(folder)
    assert set(seen) == {10, 20, 30}
    assert seen[30]["val_loss"] < seen[10]["val_loss"]
    assert seen[30]["sample"].startswith("import")
    assert summary["val_loss"] == seen[30]["val_loss"]
    one = saved.load(checkpoints.whole(folder / "run")[-1])
    export(one, tmp_path / "model", "float32")
    (path,) = (folder / "run" / "validation").glob("*/tokens_000000.bin")
    tokens = writer.read_tokens(path).astype(np.int64)
    assert len(tokens) == 1_000
    T, nats, text_nats, size = 64, [], [], 0
    for at in range(0, len(tokens) - T, T):
        inputs, targets = tokens[at : at + T], tokens[at + 1 : at + T + 1]
        logits = forward(tmp_path / "model", inputs)
        peak = logits.max(-1, keepdims=True)
        norm = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
        losses = norm - logits[np.arange(T), targets]
        nats += losses.tolist()
        text_nats += losses[targets != one.encoder.eot].tolist()
        size += sum(len(one.encoder._encoding.decode_single_token_bytes(t))  # type: ignore[attr-defined]
                    for t in targets.tolist() if t != one.encoder.eot)  # fmt: skip
    assert seen[30]["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert seen[30]["val_ppl"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert seen[30]["val_bpb"] == pytest.approx(np.sum(text_nats) / math.log(2) / size, rel=1e-5)


def test_a_death_changes_no_validation(trained: Any, tmp_path: Path) -> None:
    folder, paths, _ = trained
    latch = tmp_path / "fired"
    fault = (
        f"kill:trainer:trainer:step:25:{latch};kill:writer:writer:after_write:1:{tmp_path / 'w'}"
    )
    summary = run(tmp_path, training(tmp_path, paths), FINEWEB_FAULT=fault)
    assert latch.exists()
    assert (tmp_path / "w").exists()
    assert summary["val_loss"] == looks(folder)[30]["val_loss"]
    assert looks(tmp_path) == looks(folder)
    assert steps_of(tmp_path) == steps_of(folder)
    assert final_weights(tmp_path) == final_weights(folder)


def test_another_share_is_another_stream(trained: Any, tmp_path: Path) -> None:
    folder, paths, _ = trained
    one = training(folder, paths, validation={"share": 0.2, "tokens": 1_000})
    process = start(folder, one)
    error, _ = finish(process)
    assert process.returncode == 2
    assert "data.validation.share: 0.3 then, 0.2 now" in error["what"]


def test_validation_shards_of_their_own(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "shards", DOCUMENTS, 4, "jsonl.zst")
    random.Random(0).shuffle(paths)
    wrong = training(tmp_path / "a", paths, validation={"shards": [str(paths[1])]})
    process = start(tmp_path / "a", wrong)
    error, _ = finish(process)
    assert process.returncode == 2
    assert paths[1].name in error["what"]
    assert "one of the training shards" in error["what"]
    held = {"shards": [str(paths[0])], "tokens": 2_000}
    summary = run(tmp_path / "b", training(tmp_path / "b", paths[1:], validation=held))
    assert summary["val_bpb"] > 0
    (path,) = (tmp_path / "b" / "run" / "validation").glob("*/tokens_000000.bin")
    first = documents_of(path)[0]
    assert first in DOCUMENTS
    assert DOCUMENTS.index(first) % 30 == 0


def test_a_share_that_holds_nothing_is_an_error(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "shards", DOCUMENTS[:3], 1, "jsonl.zst")
    process = start(tmp_path, training(tmp_path, paths, validation={"share": 1e-9}))
    error, _ = finish(process)
    assert process.returncode == 2
    assert "validation has no document" in error["what"]
