"""A small training job, and what two runs of it must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import checkpoints
from tests.harness import job

STEPS = 30
SECTIONS: dict[str, Any] = {
    "model": {
        "dimensions": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2},
        "attention": {"num_heads": 2, "num_kv_heads": 1},
    },
    "training": {
        "hyperparameters": {"iters": STEPS, "batch_size": 4, "gradient_accumulation_steps": 2}
    },
    "logging": {"steps": {"checkpoint_interval": 7}, "keep_checkpoints": 2},
    "tokenizer": {"vocab_size": 600},
    "system": {"seed": 3},
}
STREAM: dict[str, Any] = {"lanes": 3, "shuffle": True, "epochs": None, "workers": 2}


def training(folder: Path, shards: list[Any], **changes: Any) -> Any:
    return job(folder, shards, kind="train", **SECTIONS, **(STREAM | changes))


def steps_of(folder: Path) -> dict[int, tuple[str, float]]:
    """Batch hash and loss of every step; a step that was done twice must have been the same."""
    seen: dict[int, tuple[str, float]] = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        now = record["batch_hash"], record["loss"]
        assert seen.setdefault(record["step"], now) == now, f"step {record['step']} differs"
    return seen


def final_weights(folder: Path) -> dict[str, bytes]:
    """Every array of the last checkpoint, weights and optimizer, by name; the order of arrays in
    the files is not MLX's to promise."""
    newest = checkpoints.whole(folder / "run")[-1]
    arrays: dict[str, bytes] = {}
    for path in newest.glob("*.safetensors"):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                arrays[name] = raw[8 + size + begin : 8 + size + end]
    assert len(arrays) > 20
    return arrays
