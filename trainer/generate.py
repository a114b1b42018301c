"""Text from a model, token by token.

Runs in: trainer, and the command line's own process for `generate`.
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
    held: list[int] = []
    for token in _tokens(model, encoder, prompt, max_tokens, temperature, top_p, seed):
        held.append(token)
        text = encoder.decode(held)
        if not text.endswith("\ufffd"):
            yield text
            held.clear()
    if held:
        yield encoder.decode(held)


def _tokens(
    model: Llama,
    encoder: Encoder,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Token ids up to the end of text. While one is shown, the next is being computed."""
    raw = np.frombuffer(prompt.encode(), np.uint8)
    ids = encoder.encode_block(raw, np.array([0, len(raw)]), False)
    key = mx.random.key(seed)

    def draw(tokens: mx.array, cache: Cache, key: mx.array) -> tuple[mx.array, Cache]:
        logits, cache = model.step(tokens[None], cache)
        token = _draw(logits[0, -1].astype(mx.float32), temperature, top_p, key)
        mx.async_eval(token)
        return token, cache

    key, use = mx.random.split(key)
    token, cache = draw(mx.array(ids), [None] * len(model.layers), use)
    for number in range(max_tokens):
        now = token
        if number + 1 < max_tokens:
            key, use = mx.random.split(key)
            token, cache = draw(now[None], cache, use)
        made = int(np.array(now))
        if made == encoder.eot:
            return
        yield made


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
