"""The token ring: every lane's tokens by absolute position, windows as numpy views.

Runs in: tokenizers (place) and consumer (read). The supervisor decides who may write or read
which positions and when; this module only finds the bytes.
"""

from __future__ import annotations

import mmap
from typing import Protocol

import numpy as np

from shm import layout


class Layout(Protocol):
    """What of the protocol's RingLayout is used here."""

    @property
    def lanes(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def slot_tokens(self) -> int: ...

    @property
    def token_bytes(self) -> int: ...


def size_bytes(shape: Layout) -> int:
    """Size of the ring segment in bytes."""
    return layout.ring_bytes(
        lanes=shape.lanes,
        slots=shape.slots,
        slot_tokens=shape.slot_tokens,
        token_bytes=shape.token_bytes,
    )


class Ring:
    """Tokens of all lanes in one mapping.

    Args:
        memory: The mapping, or any writable or readable buffer of size_bytes(shape).
        shape: The ring's layout.
    """

    def __init__(self, memory: mmap.mmap | bytearray, shape: Layout) -> None:
        self.shape = shape
        stride = layout.ring_slot_stride(shape.slot_tokens, shape.token_bytes)
        self.dtype = np.dtype(np.uint16 if shape.token_bytes == 2 else np.uint32)
        # frombuffer keeps the mapping alive under every view; ndarray(buffer=…) would not.
        flat = np.frombuffer(memory, dtype=self.dtype)
        self._slots = flat.reshape(shape.lanes, shape.slots, stride // shape.token_bytes)

    def place(self, lane: int, position: int, tokens: np.ndarray) -> None:
        """Write tokens at absolute positions of a lane, halos included.

        The first token of slot j is also the halo of slot j − 1; whoever writes the one writes
        the other.
        """
        C, slots = self.shape.slot_tokens, self.shape.slots
        done, n = 0, len(tokens)
        while done < n:
            slot, at = divmod(position + done, C)
            take = min(C - at, n - done)
            self._slots[lane, slot % slots, at : at + take] = tokens[done : done + take]
            if at == 0 and slot > 0:
                self._slots[lane, (slot - 1) % slots, C] = tokens[done]
            done += take

    def view(self, lane: int, position: int, count: int) -> np.ndarray:
        """Tokens [position, position + count) of a lane, as a view: nothing is copied.

        Raises:
            ValueError: the range does not lie whole inside one slot and its halo.
        """
        slot, at = divmod(position, self.shape.slot_tokens)
        if at + count > self.shape.slot_tokens + 1:
            raise ValueError(f"tokens {position}+{count} of lane {lane} cross the end of a slot")
        return self._slots[lane, slot % self.shape.slots, at : at + count]
