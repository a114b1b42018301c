"""The configuration: one tree of frozen structs, read from YAML, checked once at start.

Runs in: supervisor (load), trainer (reads it back from plain data). The sections and keys are
those that mlx-pretrain users know; `data.stream` is ours. All sizes are in the unit that the
name ends with; GB are 10⁹ bytes.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import yaml

from pipeline.errors import ConfigError


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and a key that it does not have is an error."""


# ── data ────────────────────────────────────────────────────────────────────────────────────


class Preprocessing(Section):
    max_context_size: int = 2048  # T: tokens the model sees; windows are T + 1


class Tokenizer(Section):
    name: str = "gpt2"  # any tiktoken encoding
    vocab_size: int | None = None  # keep only the first ranks, the end-of-text token included


class Stream(Section):
    """Where the shards are and how they are streamed."""

    shards: list[str] = []  # patterns: URLs or paths with {000..123} braces
    text_field: str = "text"  # JSON field or parquet column
    lanes: int = 8  # ordered token streams a batch is mixed from; at most the number of shards
    shuffle: bool = True  # permute the shards per epoch by system.seed
    epochs: int | None = None  # passes over the shards; null repeats them for ever
    max_disk_gb: float = 35.0  # hard budget: cached shards, partial files, checkpoints, logs
    cache_dir: str | None = None  # null: runs/<name>/cache
    workers: int | Literal["auto"] = "auto"  # tokenizers
    fetchers: int | None = None  # null: derived from the workers
    decompressors: int | None = None  # null: derived from the workers
    prefetch: int = 2  # shards each lane may fetch ahead of the one it reads
    block_bytes: int = 4 << 20  # text handed to a tokenizer at once; bounds the largest document
    slot_windows: int = 64  # windows per ring slot (C = slot_windows × T)
    ring_slots: int = 4  # ring slots per lane
    max_bad_records: int = 1000  # records that may be skipped before the run ends
    max_bad_shards: int = 0  # shards that may be skipped before the run ends
    max_retries: int = 8  # attempts without progress before a fetch fails
    timeout_s: float = 30.0  # a connection that is silent this long is given up


class Data(Section):
    preprocessing: Preprocessing = Preprocessing()
    tokenizer: Tokenizer = Tokenizer()
    stream: Stream = Stream()


# ── model ───────────────────────────────────────────────────────────────────────────────────


class Dimensions(Section):
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 12


class Attention(Section):
    num_heads: int = 16
    num_kv_heads: int | None = None  # null: num_heads
    head_dim: int | None = None  # null: hidden_size / num_heads


class Normalization(Section):
    rms_norm_eps: float = 1e-5


class Rope(Section):
    theta: float = 10000.0
    traditional: bool = False


class Misc(Section):
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True


class Model(Section):
    architecture: Literal["llama"] = "llama"
    dimensions: Dimensions = Dimensions()
    attention: Attention = Attention()
    normalization: Normalization = Normalization()
    rope: Rope = Rope()
    misc: Misc = Misc()


# ── training ────────────────────────────────────────────────────────────────────────────────


class Hyperparameters(Section):
    iters: int = 10_000  # optimizer updates
    batch_size: int = 8  # windows per micro-step
    gradient_accumulation_steps: int = 8  # micro-steps per update
    learning_rate: float = 2e-2  # of the hidden matrices (Muon), or of everything (AdamW)
    weight_decay: float = 0.01  # decoupled
    gradient_clip: float = 1.0  # global norm; 0 switches it off


class Scheduler(Section):
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1  # the last update's learning rate over the largest
    decay_steps: int | None = None  # wsd: length of the final decay; null: a fifth of iters


class Optimization(Section):
    optimizer: Literal["muon", "adamw"] = "muon"
    momentum: float = 0.95  # Muon
    nesterov: bool = True  # Muon
    ns_steps: int = 5  # Newton-Schulz iterations
    adamw_learning_rate: float = 3e-3  # embeddings, norms and head when the optimizer is Muon
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-8  # AdamW


class Training(Section):
    hyperparameters: Hyperparameters = Hyperparameters()
    scheduler: Scheduler = Scheduler()
    optimization: Optimization = Optimization()


# ── logging, system ─────────────────────────────────────────────────────────────────────────


class Steps(Section):
    logging_interval: int = 1  # updates between log lines
    checkpoint_interval: int = 500  # updates between checkpoints; the last update always has one


class Logging(Section):
    runs_dir: str = "runs"  # the run's folder is runs_dir/name
    steps: Steps = Steps()
    keep_checkpoints: int = 2  # newest checkpoints kept
    max_log_mb: float = 64.0  # all log files of the run, inside the disk budget
    sample_prompt: str | None = None  # text to continue at the end of the run; null: none
    sample_tokens: int = 48


class System(Section):
    seed: int = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs


class Config(Section):
    name: str
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    logging: Logging = Logging()
    system: System = System()
