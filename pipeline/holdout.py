"""Documents that training never sees: a share of them, chosen by their own text.

Runs in: decompressors. Pure. The hash of the text decides, so the choice is the same in every
run, and two copies of one document are on the same side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import xxhash

from pipeline.messages import BadRecord

_SEED = 0x5EED  # a hash of its own: not the digests that are used elsewhere


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out share, 0 to 1."""
    return xxhash.xxh3_64_intdigest(text, _SEED) < share * 2**64


def select(
    documents: Iterable[bytes | BadRecord], share: float, *, held_out: bool
) -> Iterator[bytes | BadRecord]:
    """The documents of one side.

    Args:
        documents: Of a shard.
        share: That is held out.
        held_out: Yield the held-out ones; else all others, and the bad records with them, so
            that each is counted once.
    """
    for document in documents:
        if isinstance(document, BadRecord):
            if not held_out:
                yield document
        elif is_held_out(document, share) == held_out:
            yield document
