"""Validation tokens: a tokenize job of its own, before the first update.

Runs in: supervisor. Decides, starts nothing.

The job has the run's own fetchers, decompressors, tokenizers, retries and budget; it reads either
the validation shards, or the training shards' held-out documents (pipeline/holdout.py) in catalog
order, until there are enough tokens. Its file stays in the run's folder and counts in its budget.

    runs/<name>/validation/<key>/tokens_000000.bin  writer.json  log.txt
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from pipeline import catalog, checkpoints
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.ranks import Rank
from pipeline.workers import writer

if TYPE_CHECKING:
    from pipeline.supervisor import Job

FOLDER = "validation"
_LOG_MB = 0.1
_STATE_BYTES = 1 << 17  # writer.json, twice while it is replaced
_TOKEN_BYTES = 4  # the most that a token takes


def wanted(config: Config) -> bool:
    """Whether the run validates at all."""
    return bool(config.data.validation.shards) or config.data.validation.share > 0


def disk_bytes(config: Config) -> int:
    """What the folder takes at most: part of the run's budget."""
    if not wanted(config):
        return 0
    tokens = config.data.validation.tokens * _TOKEN_BYTES
    return tokens + writer.HEADER_BYTES + _STATE_BYTES + int(_LOG_MB * 1e6)


def size_bytes(run_dir: Path) -> int:
    """What the folder takes now."""
    return sum(path.stat().st_size for path in (run_dir / FOLDER).rglob("*") if path.is_file())


def job_for(job: Job) -> Job:
    """The tokenize job that makes the validation tokens of a training job."""
    config = job.config
    validation, stream = config.data.validation, config.data.stream
    run_dir = Path(job.run_dir)
    others = disk_bytes(config) + int(config.logging.max_log_mb * 1e6)
    others += checkpoints.size_bytes(run_dir)
    inner = msgspec.structs.replace(
        config,
        name=f"{config.name}: validation tokens",
        data=msgspec.structs.replace(
            config.data,
            stream=msgspec.structs.replace(
                stream,
                shards=validation.shards or stream.patterns(),
                mix={},
                manifest=None if validation.shards else stream.manifest,
                lanes=1,
                shuffle=False,
                epochs=1,
                max_disk_gb=stream.max_disk_gb and stream.max_disk_gb - others / 1e9,
            ),
        ),
        logging=msgspec.structs.replace(config.logging, max_log_mb=_LOG_MB),
    )
    return msgspec.structs.replace(
        job,
        kind="tokenize",
        config=inner,
        run_dir=str(run_dir / FOLDER / _key(config)),
        limit_tokens=validation.tokens,
        file_tokens=validation.tokens,
        held_out=True,
        rank=Rank(),
    )


def _key(config: Config) -> str:
    """Names the folder: other settings are other tokens."""
    data = config.data
    of = (
        data.validation,
        data.filter,
        data.tokenizer,
        data.stream.text_field,
        data.stream.block_bytes,
    )
    trained_on = [] if data.validation.shards else data.stream.patterns()
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode((of, trained_on)))


def is_ready(inner: Job) -> bool:
    """Whether an earlier run has made them; those of other settings are deleted."""
    folder = Path(inner.run_dir)
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other.name != folder.name:
                shutil.rmtree(other)
    state = writer.read_state(folder) if folder.is_dir() else None
    return state is not None and state.complete


def tokens_file(inner: Job) -> Path:
    """The file, once it is made. Raises: ConfigError if not one document was held out."""
    path = Path(inner.run_dir) / writer.file_name(0)
    if not path.exists():
        raise ConfigError(
            "validation has no document", "raise data.validation.share, or name shards with text"
        )
    return path


def check_apart(config: Config, names: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse a validation shard that is trained on, too.

    Args:
        config: The run's.
        names: Of the training shards.
        options: See catalog.build.

    Raises:
        ConfigError: names the shard.
    """
    patterns = config.data.validation.shards
    both = set(names) & set(catalog.names(patterns, options)) if patterns else ()
    if both:
        raise ConfigError(
            f"data.validation.shards: {min(both)} is one of the training shards",
            "take it out of --shards, or hold back documents with data.validation.share instead",
        )
