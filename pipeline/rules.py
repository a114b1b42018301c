"""What a configuration must keep to beyond its types: each rule in one place, with its words.

Runs in: the command line. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipeline.config import Config, DataSet
from pipeline.errors import ConfigError

Rule = tuple[bool, str, str]  # whether it holds, the key, what is wrong if it does not

# Numbers, none of which may be zero or less; null and auto are no numbers.
_POSITIVE = (
    "data.preprocessing.max_context_size",
    "data.stream.lanes",
    "data.stream.slot_windows",
    "data.stream.timeout_s",
    "data.stream.writer_save_s",
    "data.stream.max_ranges",
    "data.stream.hang_s",
    "data.stream.consumer_hang_s",
    "data.stream.worker_memory_gb",
    "data.stream.fetchers",
    "data.stream.decompressors",
    "data.stream.workers",
    "data.stream.epochs",
    "data.validation.tokens",
    "model.dimensions.hidden_size",
    "model.dimensions.intermediate_size",
    "model.dimensions.num_layers",
    "model.attention.num_heads",
    "training.hyperparameters.iters",
    "training.hyperparameters.batch_size",
    "training.hyperparameters.gradient_accumulation_steps",
    "training.hyperparameters.learning_rate",
    "training.optimization.ns_steps",
    "training.guards.max_skipped",
    "training.guards.spike_sigmas",
    "logging.steps.logging_interval",
    "logging.steps.checkpoint_interval",
    "logging.steps.validation_interval",
    "logging.keep_checkpoints",
    "logging.keep_every",
    "ranks.start_s",
    "ranks.timeout_s",
)


def validate(config: Config) -> None:
    """Refuse combinations that cannot be. Raises: ConfigError."""
    for holds, key, what in rules(config):
        if not holds:
            raise ConfigError(f"{key}: {what}", "correct the configuration or the option")


def rules(config: Config) -> Iterator[Rule]:
    """All of them."""
    for key in _POSITIVE:
        value = _at(config, key)
        yield not isinstance(value, int | float) or value > 0, key, f"{value} is not positive"
    for name, one in config.data.stream.mix.items():
        yield from _of_data_set(f"data.stream.mix.{name}", one)
    yield from _of_stream(config)
    yield from _of_model(config)
    yield from _of_training(config)


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _of_data_set(key: str, one: DataSet) -> Iterator[Rule]:
    fits = math.isfinite(one.weight) and one.weight > 0
    yield fits, f"{key}.weight", f"{one.weight} is not positive"
    yield bool(one.shards), f"{key}.shards", "it names no shards"
    fits = one.epochs is None or one.epochs > 0
    yield fits, f"{key}.epochs", f"{one.epochs} is not positive"


def _of_stream(config: Config) -> Iterator[Rule]:
    stream, chosen = config.data.stream, config.data.filter
    both = bool(stream.shards and stream.mix)
    yield not both, "data.stream.mix", "give shards or a mix, not both"
    yield stream.ring_slots >= 2, "data.stream.ring_slots", "a ring has at least 2 slots a lane"
    yield stream.timeout_s <= 60, "data.stream.timeout_s", "it is 60 at most"
    for name in ("min_bytes_per_s", "max_disk_gb", "prefetch", "disk_wait_s"):
        yield getattr(stream, name) >= 0, f"data.stream.{name}", "it cannot be negative"
    what = "a block holds 4096 bytes or more"
    yield stream.block_bytes >= 4096, "data.stream.block_bytes", what
    low, high = chosen.min_chars, chosen.max_chars
    fits = low is None or high is None or low <= high
    what = f"{high} is less than min_chars, so no document fits"
    yield fits, "data.filter.max_chars", what


def _of_model(config: Config) -> Iterator[Rule]:
    dims, heads = config.model.dimensions, config.model.attention
    num_heads = max(1, heads.num_heads)  # zero is refused already
    kv_heads = heads.num_kv_heads or num_heads
    head_dim = heads.head_dim or dims.hidden_size // num_heads
    what = f"{num_heads} heads cannot share {kv_heads} key-value heads evenly"
    yield num_heads % kv_heads == 0, "model.attention.num_kv_heads", what
    fits = heads.head_dim is not None or dims.hidden_size % num_heads == 0
    what = f"{dims.hidden_size} is not a multiple of {num_heads}; or give head_dim"
    yield fits, "model.attention.num_heads", what
    what = f"RoPE needs an even one, not {head_dim}"
    yield head_dim % 2 == 0, "model.attention.head_dim", what


def _of_training(config: Config) -> Iterator[Rule]:
    hyper, schedule = config.training.hyperparameters, config.training.scheduler
    validation, log = config.data.validation, config.logging
    yield hyper.gradient_clip >= 0, "training.hyperparameters.gradient_clip", "it is negative"
    fits = 0 <= schedule.min_lr_ratio <= 1
    yield fits, "training.scheduler.min_lr_ratio", "it is not in [0, 1]"
    yield schedule.warmup_steps >= 0, "training.scheduler.warmup_steps", "it is negative"
    yield 0 <= validation.share < 1, "data.validation.share", "it is not in [0, 1)"
    both = bool(validation.shards and validation.share)
    yield not both, "data.validation.shards", "give shards or a share, not both"
    wanted = bool(validation.shards) or validation.share > 0
    what = "the best is told by validation: give data.validation.shards or .share"
    yield wanted or not log.keep_best, "logging.keep_best", what
    every = log.keep_every
    fits = every is None or every % max(1, log.steps.checkpoint_interval) == 0
    what = f"{every} is no multiple of logging.steps.checkpoint_interval"
    yield fits, "logging.keep_every", what
    yield log.max_log_mb >= 0.1, "logging.max_log_mb", "logs need 0.1 MB"
    fits = 0 <= (log.http_port or 0) < 65536
    yield fits, "logging.http_port", "it is no port: 0 to 65535"
