"""Random texts by the million: the columnar encoder's ids against tiktoken's.

    python -m tests.campaign_ids --texts 2000000 --seed 0

Not part of the suite: two million texts take some minutes. The same seed gives the same texts; a
difference is shown with the smallest number of texts that has it, and ends with exit code 1.
"""

from __future__ import annotations

import random
import sys
import time

import click
import numpy as np

from pipeline import columnar, encoding
from tests.fragments import random_text

_MOST_TEXTS = 3000  # of a block


@click.command()
@click.option(
    "--texts", "num_texts", default=2_000_000, show_default=True, help="At least so many."
)
@click.option("--seed", default=0, show_default=True, help="Of all random choices.")
@click.option("--tokenizer", default="gpt2", show_default=True, help="A tiktoken encoding.")
@click.option(
    "--vocab-size", multiple=True, type=int, help="Also with its first ranks; repeatable."
)
def main(num_texts: int, seed: int, tokenizer: str, vocab_size: tuple[int, ...]) -> None:
    """Compare the ids of random texts."""
    rng = random.Random(seed)
    encoders = []
    for size in (None, *vocab_size):
        encoder = encoding.load(tokenizer, size)
        if not isinstance(encoder, columnar.ColumnarEncoder):
            raise click.ClickException(f"{tokenizer} goes through tiktoken: nothing to compare")
        plain = encoding.TiktokenEncoder(encoder._encoding, encoder.eot, encoder.vocab_size)
        encoders.append((encoder, plain))
    begin = shown = time.monotonic()
    done = num_bytes = num_tokens = 0
    while done < num_texts:
        texts = [random_text(rng) for _ in range(rng.randrange(1, _MOST_TEXTS))]
        for encoder, plain in encoders:
            continues = rng.random() < 0.3
            if not same(encoder, plain, texts, continues):
                worst = smallest(encoder, plain, texts)
                sys.exit(f"DIFFERENT ({tokenizer} of {encoder.vocab_size}): {worst!r}")
        done += len(texts)
        num_bytes += sum(len(text.encode()) for text in texts)
        num_tokens += len(plain.encode_block(*block(texts), False))
        if time.monotonic() - shown > 10 or done >= num_texts:
            shown = time.monotonic()
            click.echo(
                f"{done:,} texts, {num_bytes / 1e6:,.0f} MB, {num_tokens:,} tokens, "
                f"seed {seed}: the same ids ({shown - begin:.0f} s)"
            )


def block(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The texts as documents of a block."""
    raw = [text.encode() for text in texts]
    return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0, *map(len, raw)])


def same(
    encoder: encoding.Encoder, plain: encoding.Encoder, texts: list[str], continues: bool = False
) -> bool:
    """Whether both give the same ids."""
    ids, expected = (one.encode_block(*block(texts), continues) for one in (encoder, plain))
    return ids.dtype == expected.dtype and np.array_equal(ids, expected)


def smallest(encoder: encoding.Encoder, plain: encoding.Encoder, texts: list[str]) -> list[str]:
    """The first text that differs alone, or as few neighbours as differ together."""
    for text in texts:
        if not same(encoder, plain, [text]):
            return [text]
    while len(texts) > 1:
        half = len(texts) // 2
        part = next((p for p in (texts[:half], texts[half:]) if not same(encoder, plain, p)), None)
        if part is None:
            break
        texts = part
    return texts


if __name__ == "__main__":
    main()
