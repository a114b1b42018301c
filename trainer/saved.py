"""A trained model from a run's folder, ready to use.

Runs in: the command line's own process, for `generate` and `export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from pipeline import checkpoints, encoding
from pipeline.config import Config, from_plain
from pipeline.encoding import Encoder
from pipeline.errors import ConfigError, ShardError
from trainer.model import Llama, as_dtype
from trainer.optim import Arrays


class Saved(NamedTuple):
    """A checkpoint's model and what it was trained with."""

    path: Path
    step: int
    tokens: int
    config: Config
    encoder: Encoder
    weights: Arrays  # float32, by parameter name

    def model(self, dtype: mx.Dtype) -> Llama:
        """The model with its weights in the dtype to compute in."""
        model = Llama(self.config.model, self.encoder.vocab_size)
        model.update(tree_unflatten(list(as_dtype(self.weights, dtype).items())))
        mx.eval(model.parameters())
        return model


def load(path: Path) -> Saved:
    """Read the weights of a whole checkpoint.

    Args:
        path: Its folder; pipeline/checkpoints.py finds it.

    Raises:
        ShardError: it is damaged.
        ConfigError: its tokenizer cannot be had.
    """
    state = checkpoints.read(path).state
    config = from_plain(state.config)
    tokenizer = config.data.tokenizer
    encoder = encoding.load(tokenizer.name, tokenizer.vocab_size)
    file = path / "weights.safetensors"
    try:
        weights = mx.load(str(file))
        mx.eval(weights)
    except (OSError, RuntimeError, ValueError) as error:
        raise ShardError(f"{file} cannot be read: {error}", "take another checkpoint") from error
    assert isinstance(weights, dict)
    return Saved(path, state.step, state.tokens, config, encoder, weights)


def use_device(wanted: str) -> mx.Dtype:
    """Set MLX's default device and return the dtype to compute in: bfloat16 on GPUs, float32 on
    the CPU.

    Args:
        wanted: auto, cpu or gpu.

    Raises:
        ConfigError: gpu, where there is none.
    """
    there = mx.is_available(mx.gpu)
    if wanted == "gpu" and not there:
        raise ConfigError("MLX finds no GPU here", "leave --device out, or give --device cpu")
    gpu = there and wanted != "cpu"
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    if not gpu:
        mx.disable_compile()
    return mx.bfloat16 if gpu else mx.float32
