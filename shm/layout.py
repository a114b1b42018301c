"""The byte table of the two shared-memory segments: where everything stands.

Runs in: every process. Pure. Shapes come as plain integers (RingLayout and TextLayout of the
protocol have these fields).

Ring segment: lane after lane, slot after slot, every slot padded to a page.

    slot   C + 1 tokens: positions j·C … j·C + C of the lane; the last is the halo, the first
           token of slot j + 1, so that each window of T + 1 tokens lies whole inside one slot

Text segment: slot after slot, every slot padded to a page.

    0      int64     number of documents n (a continued piece counts as one)
    8      int64     number of UTF-8 bytes
    16     int64     1 if the first piece continues the document that the previous block cut
    24     int64     reserved, 0
    32     int64[]   document offsets, n + 1 of them (room for documents + 1)
    then   uint8[]   UTF-8 bytes
"""

from __future__ import annotations

PAGE_BYTES = 16384  # Apple silicon's; a multiple of Linux's 4096
TEXT_HEADER_BYTES = 32


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of unit that is not below n."""
    return -(-n // unit) * unit


def ring_slot_stride(slot_tokens: int, token_bytes: int) -> int:
    """Bytes from one ring slot to the next."""
    return round_up((slot_tokens + 1) * token_bytes, PAGE_BYTES)


def ring_slot_offset(
    lane: int, slot: int, *, slots: int, slot_tokens: int, token_bytes: int
) -> int:
    """Byte offset of absolute slot number slot of a lane: the ring index is slot mod slots."""
    return (lane * slots + slot % slots) * ring_slot_stride(slot_tokens, token_bytes)


def ring_bytes(*, lanes: int, slots: int, slot_tokens: int, token_bytes: int) -> int:
    """Size of the ring segment in bytes."""
    return lanes * slots * ring_slot_stride(slot_tokens, token_bytes)


def text_slot_stride(text_bytes: int, documents: int) -> int:
    """Bytes from one text slot to the next."""
    return round_up(TEXT_HEADER_BYTES + 8 * (documents + 1) + text_bytes, PAGE_BYTES)


def text_bytes_total(*, slots: int, text_bytes: int, documents: int) -> int:
    """Size of the text segment in bytes."""
    return slots * text_slot_stride(text_bytes, documents)
