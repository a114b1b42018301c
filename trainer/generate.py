"""Text from a model, token by token.

Runs in: trainer.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from pipeline.encoding import Encoder
from trainer.model import Cache, Llama


def generate(
    model: Llama,
    encoder: Encoder,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a prompt.

    Args:
        model: With trained weights.
        encoder: Of the tokenizer that it was trained with.
        prompt: Text to go on from; the end-of-text token stands before it.
        max_tokens: Tokens to make at most; an end-of-text token ends it earlier.
        temperature: 0 takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Of the draws; the run's own random state is not touched.

    Yields:
        Text as it comes; a character is held back until its last byte is there.
    """
    raw = np.frombuffer(prompt.encode(), np.uint8)
    tokens = encoder.encode_block(raw, np.array([0, len(raw)]), False).tolist()
    key = mx.random.key(seed)
    cache: Cache = [None] * len(model.layers)
    made: list[int] = []
    shown = ""
    for _ in range(max_tokens):
        logits, cache = model.step(mx.array([tokens]), cache)
        key, use = mx.random.split(key)
        token = int(_draw(logits[0, -1].astype(mx.float32), temperature, top_p, use).item())
        if token == encoder.eot:
            return
        made.append(token)
        tokens = [token]
        text = encoder.decode(made)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def _draw(logits: mx.array, temperature: float, top_p: float, key: mx.array) -> mx.array:
    """One token id of logits of shape (V,)."""
    if temperature == 0:
        return mx.argmax(logits)
    logits = logits / temperature
    order = mx.argsort(-logits)
    sorted_probs = mx.softmax(logits[order])
    before = mx.cumsum(sorted_probs) - sorted_probs  # of the likelier tokens
    kept = mx.where(before < top_p, logits[order], -mx.inf)
    return order[mx.random.categorical(kept, key=key)]
