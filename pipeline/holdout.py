"""Documents that training never sees: a share of them, chosen by their own text.

Runs in: decompressors. Pure. The hash of the text decides, so the choice is the same in every
run, and two copies of one document are on the same side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import xxhash

from pipeline.blocks import Documents, Filtered, Item, Texts
from pipeline.messages import BadRecord, Entry

_SEED = 0x5EED  # a hash of its own: not the digests that are used elsewhere


def is_held_out(text: bytes | memoryview, share: float) -> bool:
    """Whether a document belongs to the held-out share, 0 to 1."""
    return xxhash.xxh3_64_intdigest(text, _SEED) < share * 2**64


def select(documents: Iterable[Item], share: float, *, held_out: bool) -> Documents:
    """The documents of one side.

    Args:
        documents: Of a shard.
        share: That is held out.
        held_out: Yield the held-out ones; else all others, and the bad and filtered records with
            them, so that each is counted once.
    """
    for document in documents:
        match document:
            case Entry():
                yield document
            case BadRecord() | Filtered():
                if not held_out:
                    yield document
            case Texts():
                yield from _runs(document, share, held_out)
            case bytes():
                if is_held_out(document, share) == held_out:
                    yield document


def _runs(texts: Texts, share: float, held_out: bool) -> Documents:
    """Stretches of documents of one side, still in their buffer."""
    raw, bounds = memoryview(texts.text), texts.offsets.tolist()
    sides = [is_held_out(raw[a:b], share) == held_out for a, b in itertools.pairwise(bounds)]
    return (run for wanted, run in texts.chosen(sides) if wanted)
