"""The loss on tokens that training never sees.

Runs in: trainer. The tokens are a file that the supervisor has made (pipeline/held_out.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from pipeline import encoding
from pipeline.config import Tokenizer
from pipeline.encoding import Encoder
from pipeline.errors import ConfigError
from pipeline.workers.writer import read_tokens
from trainer import model as llama
from trainer.model import Llama
from trainer.optim import Arrays


class Score(NamedTuple):
    """What validation says of a model."""

    loss: float  # nats per token, end-of-text tokens counted
    bits_per_byte: float  # of the text's bytes, end-of-text tokens not counted

    def metrics(self) -> dict[str, float]:
        """As metrics.jsonl has them."""
        return {
            "val_loss": self.loss,
            "val_ppl": math.exp(min(self.loss, 700.0)),
            "val_bpb": self.bits_per_byte,
        }


def token_bytes(tokenizer: Tokenizer, encoder: Encoder) -> np.ndarray:
    """Length in bytes of every token's text, shape (V,); 0 for special tokens."""
    lengths = np.zeros(encoder.vocab_size, np.int32)
    for token, rank in encoding.whole(tokenizer.name)._mergeable_ranks.items():
        if rank < encoder.vocab_size and rank != encoder.eot:
            lengths[rank] = len(token)
    return lengths


class Validation:
    """Held-out windows, and how a model does on them.

    Args:
        path: Token file.
        tokenizer: That it was made with.
        encoder: The same.
        seq_len: T; windows do not overlap but for the one token that is target and input.
        batch: Windows at once.
        eot: Attention stays inside the documents that begin with it; None: it does not.

    Raises:
        ConfigError: the file holds less than one window.

    Source: bits per byte as in nanochat's loss_eval.py; comparable across tokenizers.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        encoder: Encoder,
        seq_len: int,
        batch: int,
        eot: int | None = None,
    ) -> None:
        tokens = read_tokens(path)
        if len(tokens) <= seq_len:
            raise ConfigError(
                f"validation has {len(tokens)} tokens, less than one window of {seq_len} + 1",
                "hold more back: data.validation.shards, .share or .tokens",
            )
        windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
        self._windows = np.ascontiguousarray(windows)
        self._batch, self._eot = batch, eot
        self._lengths = mx.array(token_bytes(tokenizer, encoder))

    @property
    def num_tokens(self) -> int:
        """Targets that are scored."""
        count, length = self._windows.shape
        return int(count * (length - 1))

    def score(self, model: Llama, weights: Arrays, dtype: mx.Dtype) -> Score:
        """Loss and bits per byte of the weights, computed in dtype."""
        cast = llama.as_dtype(weights, dtype)
        totals = np.zeros(3)
        model.update(tree_unflatten(list(cast.items())))
        for at in range(0, len(self._windows), self._batch):
            rows = mx.array(self._windows[at : at + self._batch])
            totals += np.array(self._sums_of(model, rows, dtype), np.float64)
        nats, text_nats, text_bytes = totals.tolist()
        return Score(nats / self.num_tokens, text_nats / (math.log(2) * text_bytes))

    def _sums_of(self, model: Llama, rows_BT1: mx.array, dtype: mx.Dtype) -> list[float]:
        """Nats of all targets, nats and bytes of those that are text."""
        targets = rows_BT1[:, 1:]
        nats = llama.losses(model, rows_BT1, dtype, eot=self._eot)
        lengths = self._lengths[targets]
        sums = [nats.sum(), (nats * (lengths > 0)).sum(), lengths.sum().astype(mx.float32)]
        return [float(np.array(one)) for one in sums]
