"""Text slots: whole documents as UTF-8 bytes and offsets.

Runs in: decompressors (write) and tokenizers (read in place).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from shm import layout


class Layout(Protocol):
    """What of the protocol's TextLayout is used here."""

    @property
    def slots(self) -> int: ...

    @property
    def text_bytes(self) -> int: ...

    @property
    def documents(self) -> int: ...


class Block(NamedTuple):
    """One block, as views of its slot.

    text: UTF-8 bytes, shape (n_bytes,), uint8. offsets: shape (n_documents + 1,), int64, from 0
    to n_bytes. continues: the first piece continues the document that the previous block cut.
    """

    text: np.ndarray
    offsets: np.ndarray
    continues: bool


def size_bytes(shape: Layout) -> int:
    """Size of the text segment in bytes."""
    return layout.text_bytes_total(
        slots=shape.slots, text_bytes=shape.text_bytes, documents=shape.documents
    )


class TextSlots:
    """All text slots in one mapping."""

    def __init__(self, memory: mmap.mmap | bytearray, shape: Layout) -> None:
        self.shape = shape
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self._stride = layout.text_slot_stride(shape.text_bytes, shape.documents)

    def _parts(self, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Header (4 int64), offsets (documents + 1 int64), bytes (text_bytes)."""
        raw = self._bytes[slot * self._stride : (slot + 1) * self._stride]
        text_at = layout.TEXT_HEADER_BYTES + 8 * (self.shape.documents + 1)
        words = raw[:text_at].view(np.int64)
        return words[:4], words[4:], raw[text_at : text_at + self.shape.text_bytes]

    def write(
        self,
        slot: int,
        pieces: Sequence[bytes | np.ndarray],
        lengths: Sequence[int],
        *,
        continues: bool,
    ) -> int:
        """Fill a slot and return the number of UTF-8 bytes.

        Args:
            slot: Its number.
            pieces: Buffers that hold the documents one after the other.
            lengths: Bytes of every document.
            continues: The first one goes on with a document that an earlier block cut.

        Raises:
            ValueError: the documents do not fit; the block rule should have cut earlier.
        """
        header, offsets, room = self._parts(slot)
        size, count = sum(lengths), len(lengths)
        if size > self.shape.text_bytes or count > self.shape.documents:
            raise ValueError(f"{count} documents of {size} bytes do not fit a slot")
        offsets[0] = 0
        np.cumsum(lengths, out=offsets[1 : count + 1])
        target, end = memoryview(room), 0
        for piece in pieces:
            begin, end = end, end + len(piece)
            target[begin:end] = piece
        header[:] = count, size, int(continues), 0
        return size

    def read(self, slot: int) -> Block:
        """The block in a slot, as views: valid until the supervisor gives the slot away."""
        header, offsets, room = self._parts(slot)
        documents, text_bytes, continues = int(header[0]), int(header[1]), bool(header[2])
        return Block(room[:text_bytes], offsets[: documents + 1], continues)
