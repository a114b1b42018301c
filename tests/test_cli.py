"""The command line and the configuration, as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import settings
from pipeline.errors import ConfigError
from tests.harness import ROOT, english, write_shards

PROGRAM = Path(sys.executable).parent / "fineweb-pipeline"
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "preprocessing": {"max_context_size": 32},
        "tokenizer": {"vocab_size": 500},
        "stream": {"block_bytes": 20_000, "slot_windows": 4, "lanes": 2},
    },
    "model": {
        "dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
        "attention": {"num_heads": 2},
    },
    "training": {
        "hyperparameters": {"iters": 3, "batch_size": 2, "gradient_accumulation_steps": 1}
    },
    "logging": {"max_log_mb": 0.5},
}


def call(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(one) for one in arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        timeout=100,
        check=False,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


# ── configuration ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("name: a\ndata: {streem: {}}", "data.streem", "data.stream"),
        ("name: a\nmodel: {dimensions: {hiden_size: 3}}", "model.dimensions.hiden_size",
         "model.dimensions.hidden_size"),
        ("name: a\ntraining: {hyperparameters: {iters: many}}",
         "training.hyperparameters.iters", "correct"),
        ("name: a\nmodel: {attention: {num_heads: 3}}", "model.attention.num_heads", "correct"),
        ("name: a\nmodel: {attention: {num_heads: 16, num_kv_heads: 3}}",
         "model.attention.num_kv_heads", "correct"),
        ("name: a\ndata: {stream: {ring_slots: 1}}", "data.stream.ring_slots", "correct"),
        ("name: a\ndata: {stream: {max_disk_gb: -1}}", "data.stream.max_disk_gb", "correct"),
        ("name: a\ndata: 7", "data", "correct"),
        ("- 1", "holds no configuration", "name:"),
        ("name: [", "no YAML", "correct"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_configuration_is_named_with_its_place(
    tmp_path: Path, text: str, what: str, remedy: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load(str(path), {"data.stream.shards": ["x"]})
    assert what in caught.value.what
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    assert settings.load(str(path), {}).name


# ── commands ────────────────────────────────────────────────────────────────────────────────


def test_tokenize_prints_one_json_line_with_every_figure(tmp_path: Path, tiny: Path) -> None:
    shards = write_shards(tmp_path / "shards", english(40), 3, "jsonl.zst")
    pattern = str(tmp_path / "shards" / "shard-{00000..00002}.jsonl.zst")
    out = tmp_path / "out"
    options = ["--json", "--max-disk", "1", "--where", "id < 12", "--max-chars", "100000"]
    done = call(PROGRAM, "tokenize", "--shards", pattern, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    for key in (
        "tokens", "documents", "shards", "bad_records", "text_bytes", "sha256", "wall_s", "cpu_s",
        "peak_disk_bytes", "peak_rss_bytes",
    ):  # fmt: skip
        assert key in summary
    # 14, 14 and 12 documents, numbered in each shard
    assert (summary["documents"], summary["filtered"]) == (36, 4)
    assert summary["shards"] == len(shards)
    refused = call(PROGRAM, "tokenize", "--shards", pattern, "--out", out, "--fresh")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert (out / "tokens_000000.bin").exists()


def test_the_script_has_exactly_its_five_options_and_trains(tmp_path: Path, tiny: Path) -> None:
    script = ROOT / "run_fineweb_limited.sh"
    write_shards(tmp_path / "shards", english(60), 4)
    usage = call(script, "--help")
    assert usage.returncode == 0
    options = {word for word in usage.stdout.split() if word.startswith("--")}
    assert options >= {"--config", "--shards", "--workers", "--prefetch", "--max-disk"}
    assert call(script).returncode == 2
    assert "unknown option --steps" in call(script, "--steps", "3").stderr
    done = call(
        script, "--config", tiny, "--workers", "1", "--prefetch", "1", "--max-disk", "0.2",
        "--shards", tmp_path / "shards" / "shard-{00000..00001}.tar.bz2",
        "--shards", tmp_path / "shards" / "shard-{00002..00003}.tar.bz2",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert (run / "checkpoints" / "step-00000003" / "state.json").exists()
    assert "done after" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["start", "--config", "nowhere"], 2, "there is no configuration nowhere"),
        (["start", "--shards", "/nowhere/x.tar"], 2, "nothing is at /nowhere/x.tar"),
        (["start", "--workers", "many"], 2, "neither a positive number nor auto"),
        (["tokenize", "--shards", "http://127.0.0.1:9/x.jsonl", "--out", "o", "--tokenizer", "gp2"],
         2, "gpt2"),
        (["tokenize", "--shards", "ftp://host/x.jsonl", "--out", "o"], 5, "ftp"),
    ],
)  # fmt: skip
def test_an_error_is_said_in_words_with_its_exit_code(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    done = call(PROGRAM, *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches() -> None:
    assert os.access(ROOT / "run_fineweb_limited.sh", os.X_OK)
    for command in ([], ["start"], ["tokenize"]):
        done = call(PROGRAM, *command, "--help")
        assert done.returncode == 0
        assert "fineweb-pipeline" in done.stdout
        assert "Exit codes" in done.stdout


def test_a_pattern_that_the_shell_took_apart_is_told_how_to_be_written() -> None:
    done = call(PROGRAM, "tokenize", "--out", "t", "--shards", "a.tar", "b.tar")
    assert done.returncode == 2
    assert "quote patterns" in done.stderr
