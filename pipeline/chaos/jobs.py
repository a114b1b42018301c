"""The campaign's jobs: small sizes, so that a short run passes every boundary many times.

Runs in: chaos.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

SEQ_LEN, LANES = 128, 4
_BATCH = 16
UPDATE_TOKENS = _BATCH * SEQ_LEN
_ROUND_EPOCHS = 3
_EVER = 1_000_000  # epochs
_LOG_MB = 4.0
_CHECKPOINTS_MB = 8.0  # two of the model below, and the one being written
_HEADER_BYTES = 1024

_MODEL = {
    "dimensions": {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2},
    "attention": {"num_heads": 2, "num_kv_heads": 1},
}


class Job:
    """One job of a campaign, and its undisturbed counterpart.

    Args:
        kind: tokenize or train.
        folder: Of the campaign.
        url: Of the server.
        facts: Of the corpus: shards, shard_bytes.
    """

    def __init__(self, kind: str, folder: Path, url: str, facts: dict[str, int]) -> None:
        self._kind, self._folder = kind, folder
        self._pattern = f"{url}/shard-{{00000..{facts['shards'] - 1:05d}}}.tar.bz2"
        self.run_dir = folder / "runs" / "chaos"
        self.cache_dir = folder / "cache"
        self.reference_dir = folder / "reference"
        self.counted = (self.run_dir, self.cache_dir)
        largest = 2 * facts["shard_bytes"] // facts["shards"]
        mb = _LOG_MB + 0.3 + 2 * LANES * largest / 1e6
        self.max_disk_gb = (mb + (_CHECKPOINTS_MB if kind == "train" else 0)) / 1e3
        self.budget_bytes = int(self.max_disk_gb * 1e9)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(self._config()))
        self._common = [
            sys.executable, "-c", "from pipeline.cli import main; main()",
        ]  # fmt: skip
        self._options = [
            "--config", str(config), "--shards", self._pattern, "--lanes", str(LANES),
            "--max-disk", f"{self.max_disk_gb:.6f}", "--json", "--plain",
        ]  # fmt: skip

    def _config(self) -> dict[str, Any]:
        """Deadlines are short, so that a campaign of minutes meets them often."""
        return {
            "name": "chaos",
            "data": {
                "preprocessing": {"max_context_size": SEQ_LEN},
                "tokenizer": {"name": "gpt2", "vocab_size": 1024},
                "stream": {
                    "workers": 2, "fetchers": 2, "decompressors": 2, "prefetch": 1,
                    "block_bytes": 1 << 16, "slot_windows": 16, "ring_slots": 3,
                    "timeout_s": 2.0, "hang_s": 8.0, "consumer_hang_s": 90.0,
                    "worker_memory_gb": 0.6, "writer_save_s": 1.0,
                },
            },
            "model": _MODEL,
            "training": {
                "hyperparameters": {
                    "iters": 100_000_000, "batch_size": _BATCH, "gradient_accumulation_steps": 1,
                    "learning_rate": 1e-3,
                },
                "scheduler": {"type": "constant"},
            },
            "logging": {
                "runs_dir": str(self._folder / "runs"),
                "steps": {"checkpoint_interval": 20},
                "keep_checkpoints": 2,
                "max_log_mb": _LOG_MB,
            },
            "system": {"seed": 5},
        }  # fmt: skip

    def command(self) -> list[str]:
        """The run that is disturbed."""
        own = ["--cache-dir", str(self.cache_dir)]
        if self._kind == "train":
            return [*self._common, "start", *self._options, *own]
        epochs = ["--shuffle", "--epochs", str(_ROUND_EPOCHS)]
        return [
            *self._common, "tokenize", *self._options, *own, *epochs, "--out", str(self.run_dir),
        ]  # fmt: skip

    def reference(self, limit: int | None) -> list[str]:
        """The undisturbed run: the same stream, as far as limit tokens."""
        epochs = _ROUND_EPOCHS if self._kind == "tokenize" else _EVER
        length = ["--shuffle", "--epochs", str(epochs)]
        if limit is not None:
            length += ["--limit-tokens", str(limit)]
        return [
            *self._common, "tokenize", *self._options, *length, "--out", str(self.reference_dir),
            "--fresh", "--yes",
        ]  # fmt: skip

    def start_over(self) -> None:
        """Forget the round before."""
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def partial_files(self) -> list[Path]:
        """Files of an unfinished fetch or checkpoint, which a run that is over must not leave."""
        return [
            *self.run_dir.glob("checkpoints/*.partial"),
            *self.run_dir.glob("*.partial"),
        ]


# ── batches ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Hashes:
    """Batch hashes that a run reported, by update, and where two of one update differ."""

    by_step: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class MetricsReader:
    """Follows metrics.jsonl over restarts and rotations of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = self._inode = 0
        self._rest = b""
        self._seen: dict[int, tuple[str, float]] = {}
        self.hashes = Hashes()

    def poll(self) -> None:
        """Take the lines that have been written since the last call."""
        old = self._path.with_name(f"{self._path.name}.1")
        try:
            inode = self._path.stat().st_ino
            if self._inode not in (0, inode):  # rotated: first the end of what is now the old one
                if old.exists() and old.stat().st_ino == self._inode:
                    self._take(old)
                self._at, self._rest = 0, b""
            self._inode = inode
            self._take(self._path)
        except FileNotFoundError:
            return

    def _take(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            record = msgspec.json.decode(line)
            self._note(record["step"], record["batch_hash"], record["loss"])

    def _note(self, step: int, batch_hash: str, loss: float) -> None:
        before = self._seen.setdefault(step, (batch_hash, loss))
        if before != (batch_hash, loss):
            self.hashes.problems.append(
                f"update {step} was {before} and, repeated, {(batch_hash, loss)}"
            )
        self.hashes.by_step[step] = batch_hash


def reference_hashes(folder: Path, updates: int) -> dict[int, str]:
    """Batch hashes of the first updates, from the token files of an undisturbed `tokenize`.

    It writes T tokens of every lane in turn, so chunk k·L + l is window k of lane l without its
    last token, which is the first of chunk (k + 1)·L + l. Independent of the ring and the trainer.
    """
    paths = sorted(folder.glob("tokens_*.bin"))
    tokens = np.concatenate([np.fromfile(path, "<u2", offset=_HEADER_BYTES) for path in paths])
    chunks = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].reshape(-1, SEQ_LEN)
    hashes = {}
    for step in range(1, updates + 1):
        digest = hashlib.sha256()
        for window in range((step - 1) * _BATCH, step * _BATCH):
            row = chunks[window].tobytes() + chunks[window + LANES, :1].tobytes()
            digest.update(hashlib.sha256(row).digest())
        hashes[step] = digest.hexdigest()
    return hashes
