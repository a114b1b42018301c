"""A model's weights, its optimizer's state and its FLOPs, counted from the configuration alone.

Runs in: trainer, and the command line for `plan`. Pure; imports no mlx.
"""

from __future__ import annotations

from pipeline.config import Config, Model

_FLOAT_BYTES = 4  # weights and optimizer state are float32
_SCALARS = 1 + 6  # updates counted by the optimizer; what trainer/guards.py keeps
HEADERS_BYTES = 1 << 18  # of a checkpoint: safetensors headers, state.json with the cursor


def shape_of(config: Model) -> tuple[int, int, int]:
    """Heads, key-value heads and head dimension, defaults filled in."""
    heads = config.attention.num_heads
    kv_heads = config.attention.num_kv_heads or heads
    return heads, kv_heads, config.attention.head_dim or config.dimensions.hidden_size // heads


def layer_parameters(config: Model) -> int:
    """Weights of the matrices inside the layers: those that Muon is for."""
    heads, kv_heads, head_dim = shape_of(config)
    dims = config.dimensions
    attention = 2 * dims.hidden_size * head_dim * (heads + kv_heads)
    mlp = 3 * dims.hidden_size * dims.intermediate_size
    return dims.num_layers * (attention + mlp)


def matmul_parameters(config: Model, vocab_size: int) -> int:
    """Weights that every token is multiplied with: all but the norms and an untied embedding."""
    return layer_parameters(config) + vocab_size * config.dimensions.hidden_size


def num_parameters(config: Model, vocab_size: int) -> int:
    """All weights: the true size of the model."""
    heads, kv_heads, head_dim = shape_of(config)
    dims, misc = config.dimensions, config.misc
    total = matmul_parameters(config, vocab_size) + dims.hidden_size * (2 * dims.num_layers + 1)
    if not misc.tie_word_embeddings:
        total += vocab_size * dims.hidden_size
    if misc.attention_bias:
        total += dims.num_layers * (head_dim * (heads + 2 * kv_heads) + dims.hidden_size)
    if misc.mlp_bias:
        total += dims.num_layers * (2 * dims.intermediate_size + dims.hidden_size)
    return total


def flops_per_token(config: Model, vocab_size: int, seq_len: int) -> int:
    """Training FLOPs per token by PaLM's count: 6 per weight, 12·L·H·d·T for attention.

    Source: PaLM, appendix B.
    """
    heads, _, head_dim = shape_of(config)
    attention = 12 * config.dimensions.num_layers * heads * head_dim * seq_len
    return 6 * matmul_parameters(config, vocab_size) + attention


def optimizer_bytes(config: Config, vocab_size: int) -> int:
    """Optimizer state: one moment of what Muon updates, two of the rest, and the guards' sums."""
    count = num_parameters(config.model, vocab_size)
    muon = config.training.optimization.optimizer == "muon"
    hidden = layer_parameters(config.model) if muon else 0
    return _FLOAT_BYTES * (hidden + 2 * (count - hidden) + _SCALARS)


def optimizer_flops(config: Config, vocab_size: int) -> float:
    """Of one step: Newton-Schulz iterations on every hidden matrix, and a few operations a weight.

    Source: trainer/optim.py, orthogonalize: with s the smaller side and l the larger one, an
    iteration is two products of s × s × l and one of s × s × s.
    """
    heads, kv_heads, head_dim = shape_of(config.model)
    dims, chosen = config.model.dimensions, config.training.optimization
    D, F = dims.hidden_size, dims.intermediate_size
    total = 16.0 * num_parameters(config.model, vocab_size)
    if chosen.optimizer == "muon":
        sides = [(heads * head_dim, D)] * 2 + [(kv_heads * head_dim, D)] * 2 + [(F, D)] * 3
        for rows, columns in sides:
            s, l = min(rows, columns), max(rows, columns)  # noqa: E741 - as the source has it
            total += dims.num_layers * chosen.ns_steps * (4 * s * s * l + 2 * s**3)
    return total


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """What one checkpoint can take on disk at most, which is what is reserved for it."""
    weights = _FLOAT_BYTES * num_parameters(config.model, vocab_size)
    return weights + optimizer_bytes(config, vocab_size) + HEADERS_BYTES


def activation_bytes(config: Config, vocab_size: int, batch: int, item_bytes: int) -> int:
    """Roughly what a micro-step keeps for its backward pass: an estimate, where nothing was
    measured.

    Args:
        config: The run's.
        vocab_size: V.
        batch: Windows at once.
        item_bytes: Of the dtype that is computed in.

    Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models,
    section 4, counted for this model's layers: inputs of the matrix products, of the norms and of
    the gate; scores where attention is not fused (the CPU, Metal) come on top.
    """
    heads, kv_heads, head_dim = shape_of(config.model)
    dims, T = config.model.dimensions, config.data.preprocessing.max_context_size
    width = 4 * dims.hidden_size + 2 * head_dim * (heads + kv_heads) + 4 * dims.intermediate_size
    scores = heads * T
    kept = 1 if config.system.activation_checkpointing else dims.num_layers
    per_token = kept * (width + scores) + dims.num_layers * dims.hidden_size
    return batch * T * item_bytes * per_token
