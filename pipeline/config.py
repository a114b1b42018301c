"""The configuration: one tree of frozen structs, read from YAML, checked once at start.

Runs in: supervisor (read by pipeline/settings.py), trainer (from plain data). The sections and
keys are those that mlx-pretrain users know; `data.stream` is ours. All sizes are in the unit that
the name ends with; GB are 10⁹ bytes.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

import msgspec

from pipeline.errors import ConfigError
from pipeline.redaction import redact


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: immutable, and a key that it does not have is an error."""


# ── data ────────────────────────────────────────────────────────────────────────────────────


class Preprocessing(Section):
    max_context_size: int = 2048  # T: tokens the model sees; windows are T + 1
    # Attention stays inside its document. RoPE is relative, so this is also the same as positions
    # that begin anew with every document. Off: docs/TRAINING.md says why.
    mask_documents: bool = False


class Tokenizer(Section):
    name: str = "gpt2"  # any tiktoken encoding
    vocab_size: int | None = None  # keep only the first ranks, the end-of-text token included


class DataSet(Section):
    """One part of a mix."""

    shards: list[str]  # patterns
    weight: float = 1.0  # of its windows beside the other data sets' weights
    epochs: int | None = None  # passes over its shards; its end is the run's; null: for ever


class Stream(Section):
    """Where the shards are and how they are streamed."""

    shards: list[str] = []  # patterns: pipeline/listing.py says which there are
    mix: dict[str, DataSet] = {}  # or several data sets by name, mixed by weight
    manifest: str | None = None  # file with sizes and SHA-256 of the shards, which are enforced
    text_field: str = "text"  # JSON field or column of a table; /a/b/0 is what is nested
    lanes: int = 8  # ordered token streams a batch is mixed from; at most the number of shards
    shuffle: bool = True  # permute the shards per epoch by system.seed
    epochs: int | None = None  # passes over the shards; null repeats them for ever
    # Hard budget: cached shards, partial files, checkpoints, logs. 0: shards are streamed through
    # memory, so that no byte of them stands on the disk; checkpoints and logs still do.
    max_disk_gb: float = 35.0
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
    min_bytes_per_s: float = 10_000  # so is one slower than this over timeout_s; 0: no limit
    max_ranges: int = 4  # of one large shard at once, where more are faster; never on the hub
    hang_s: float = 180.0  # a worker that has work and is silent this long is replaced
    consumer_hang_s: float = 3600.0  # the same for the trainer or writer: an update may take long
    worker_memory_gb: float | None = None  # a larger worker is replaced; null: a quarter of all
    writer_save_s: float = 10.0  # tokenize: what was written is made durable this often
    disk_wait_s: float = 600.0  # a checkpoint that meets a full disk is tried again this long

    def patterns(self) -> list[str]:
        """Of all shards that are trained on."""
        return self.shards + [pattern for one in self.mix.values() for pattern in one.shards]

    def source_options(self) -> dict[str, Any]:
        """What pipeline.sources and pipeline.catalog want to know."""
        names = ("max_retries", "timeout_s", "min_bytes_per_s", "max_ranges")
        return {name: getattr(self, name) for name in names}


class Validation(Section):
    """Text that is never trained on; without shards and share there is no validation."""

    shards: list[str] = []  # patterns of shards of their own
    share: float = 0.0  # or this share of the training shards' documents, by a hash of their text
    tokens: int = 262_144  # the first tokens of those documents


class Filter(Section):
    """Which documents are read: all of these must hold. The columns are those of FineWeb."""

    min_chars: int | None = None  # characters (code points) of the text
    max_chars: int | None = None
    languages: list[str] = []  # column language is one of these
    min_language_score: float | None = None  # column language_score
    dumps: list[str] = []  # column dump is one of these: CC-MAIN-2024-10
    from_date: str | None = None  # column date, in ISO's form, is this or later
    before_date: str | None = None  # and earlier than this
    where: str | None = None  # any condition over columns: pipeline/expressions.py


class Data(Section):
    preprocessing: Preprocessing = Preprocessing()
    tokenizer: Tokenizer = Tokenizer()
    stream: Stream = Stream()
    filter: Filter = Filter()
    validation: Validation = Validation()


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
    # Windows per micro-step. auto: as many as memory holds; gradient_accumulation_steps then counts
    # windows, so that an update has that many, however they are split.
    batch_size: int | Literal["auto"] = 8
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


class Guards(Section):
    """What is done about updates that look wrong."""

    max_skipped: int = 8  # skipped updates in a row that end the run
    spike_sigmas: float = 6.0  # a loss this far above its running mean is a spike; logged
    skip_spikes: bool = False  # and its update is left out


class Training(Section):
    hyperparameters: Hyperparameters = Hyperparameters()
    scheduler: Scheduler = Scheduler()
    optimization: Optimization = Optimization()
    guards: Guards = Guards()


# ── logging, system ─────────────────────────────────────────────────────────────────────────


class Steps(Section):
    logging_interval: int = 1  # updates between log lines
    checkpoint_interval: int = 500  # updates between checkpoints; the last update always has one
    validation_interval: int = 250  # updates between validations, if any; the last one has one


class Logging(Section):
    runs_dir: str = "runs"  # the run's folder is runs_dir/name
    steps: Steps = Steps()
    keep_checkpoints: int = 2  # newest checkpoints kept
    keep_best: bool = False  # also the one of the lowest validation loss
    keep_every: int | None = None  # also those of every n-th update; null: none
    max_log_mb: float = 64.0  # all log files of the run, inside the disk budget
    tensorboard: bool = False  # also event files in tensorboard/, at most max_log_mb more
    wandb: str | None = None  # also a run in this project of Weights & Biases
    sample_prompt: str | None = None  # text to continue at the end of the run; null: none
    sample_tokens: int = 48
    http_port: int | None = None  # serve the run's status on this port; 0: a free one; null: no
    http_host: str = "127.0.0.1"  # to this machine alone; 0.0.0.0: to whoever can reach it


class System(Section):
    seed: int = 0
    time_limit_s: float | None = None  # training ends with a checkpoint after this long
    device: Literal["auto", "cpu", "gpu"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs
    # The head's logits are computed some rows at a time, and never kept. auto: in float32; in
    # bfloat16 GPUs have a fused kernel, which needs the memory and is faster.
    chunked_loss: Literal["auto", "always", "never"] = "auto"
    activation_checkpointing: bool = False  # layers are computed again in the backward pass
    # auto: on GPUs. On the CPU MLX calls the C++ compiler for every fused kernel: 40 s at the
    # first start, for updates that are 15 % faster.
    compile: Literal["auto", "always", "never"] = "auto"


class Ranks(Section):
    """Several processes or hosts that train one model: docs/DISTRIBUTED.md."""

    # host:port where rank 0 waits for the others; null: next to where a launcher says that it is
    meeting: str | None = None
    start_s: float = 120.0  # the others are waited for this long
    timeout_s: float = 30.0  # a host that cannot be reached for this long is lost
    # What gradients are summed in; bfloat16 halves the bytes, and rounds before the sum.
    gradients: Literal["float32", "bfloat16"] = "float32"


class Config(Section):
    name: str
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    logging: Logging = Logging()
    system: System = System()
    ranks: Ranks = Ranks()


# ── plain data ─────────────────────────────────────────────────────────────────────────────────


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration of plain data. Raises: ConfigError."""
    _refuse_unknown(plain, Config, "")
    try:
        return msgspec.convert(plain, Config)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise ConfigError(f"{where.rstrip('`') or 'configuration'}: {what}", "correct it") from None


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as plain data, every default written out."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def without_secrets(config: Config) -> Config:
    """The configuration as it may be shown and stored: without the secrets of shards' URLs."""
    data = config.data
    mix = {name: _redacted(one) for name, one in data.stream.mix.items()}
    stream = msgspec.structs.replace(_redacted(data.stream), mix=mix)
    validation = _redacted(data.validation)
    data = msgspec.structs.replace(data, stream=stream, validation=validation)
    return msgspec.structs.replace(config, data=data)


_WithShards = TypeVar("_WithShards", Stream, Validation, DataSet)


def _redacted(section: _WithShards) -> _WithShards:
    shards = [redact(pattern) for pattern in section.shards]
    return msgspec.structs.replace(section, shards=shards)


def _refuse_unknown(plain: Any, section: type[msgspec.Struct], path: str) -> None:
    """Find the first key that its section does not have."""
    if not isinstance(plain, dict):
        return  # a wrong type: msgspec says so
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    for key, value in plain.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"valid keys: {', '.join(fields)}"
            raise ConfigError(f"{path}{key} is no key of the configuration", hint)
        kind = fields[key]
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            _refuse_unknown(value, kind, f"{path}{key}.")
