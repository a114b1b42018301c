"""The segments: what is written is what is read, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import RingLayout, TextLayout
from shm import layout, ring, segment, text


def _named() -> set[str]:
    """Named segments. Folders there belong to tests that run beside this one."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.is_file()}


def test_a_segment_has_no_name_and_is_shared_by_descriptor() -> None:
    before = _named()
    fd = segment.create(3 * layout.PAGE_BYTES)
    mapping = segment.attach(fd, 3 * layout.PAGE_BYTES, writable=True)
    mapping[5:8] = b"abc"
    code = (
        "import sys; from shm import segment;"
        f"m = segment.attach({fd}, {3 * layout.PAGE_BYTES}, writable=False);"
        "print(bytes(m[5:8]).decode())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[fd], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "abc"
    assert _named() == before
    os.close(fd)
    assert mapping[5:8] == b"abc"  # the mapping outlives the descriptor


def test_a_reader_cannot_write() -> None:
    fd = segment.create(layout.PAGE_BYTES)
    mapping = segment.attach(fd, layout.PAGE_BYTES, writable=False)
    os.close(fd)
    with pytest.raises(TypeError):
        mapping[0] = 1
    shape = RingLayout(lanes=1, slots=1, slot_tokens=8, token_bytes=2)
    with pytest.raises(ValueError, match="read-only"):
        ring.Ring(mapping, shape).place(0, 0, np.ones(3, np.uint16))


@given(
    slots=st.integers(2, 4),
    windows=st.integers(1, 4),
    seq_len=st.integers(1, 9),
    token_bytes=st.sampled_from([2, 4]),
    start=st.integers(0, 50),
    pieces=st.lists(st.integers(1, 40), min_size=1, max_size=12),
)
def test_every_window_is_a_view_of_the_stream(
    slots: int, windows: int, seq_len: int, token_bytes: int, start: int, pieces: list[int]
) -> None:
    """Against a plain array: pieces placed in any sizes, released as they are read."""
    shape = RingLayout(lanes=2, slots=slots, slot_tokens=windows * seq_len, token_bytes=token_bytes)
    tokens = ring.Ring(bytearray(ring.size_bytes(shape)), shape)
    start = start // seq_len * seq_len
    stream = np.arange(start + sum(pieces)).astype(tokens.dtype)
    position = read = start
    released = start // shape.slot_tokens
    for piece in pieces:
        done = 0
        while done < piece:
            room = (released + slots) * shape.slot_tokens - position
            take = min(piece - done, room)
            tokens.place(1, position, stream[position : position + take])
            position += take
            done += take
            while position - read > seq_len:
                view = tokens.view(1, read, seq_len + 1)
                assert view.base is not None
                np.testing.assert_array_equal(view, stream[read : read + seq_len + 1])
                read += seq_len
            # a slot is free only when its halo was read too, so keep the one being read
            released = read // shape.slot_tokens
            if take == 0:
                assert position == (released + slots) * shape.slot_tokens
                break
        if done < piece:
            break
    assert not tokens._slots[0].any(), "another lane was written"


def test_a_window_across_slots_is_refused() -> None:
    shape = RingLayout(lanes=1, slots=2, slot_tokens=8, token_bytes=2)
    tokens = ring.Ring(bytearray(ring.size_bytes(shape)), shape)
    tokens.view(0, 4, 5)
    with pytest.raises(ValueError, match="cross the end"):
        tokens.view(0, 4, 6)


@settings(max_examples=50)
@given(documents=st.lists(st.binary(max_size=60), min_size=1, max_size=20), continues=st.booleans())
def test_text_slots_hold_documents(documents: list[bytes], continues: bool) -> None:
    shape = TextLayout(slots=2, text_bytes=1200, documents=20)
    slots = text.TextSlots(bytearray(text.size_bytes(shape)), shape)
    slots.write(0, [b"other"], [5], continues=False)
    lengths = [len(document) for document in documents]
    assert slots.write(1, documents, lengths, continues=continues) == sum(lengths)
    block = slots.read(1)
    raw = block.text.tobytes()
    bounds = list(zip(block.offsets, block.offsets[1:], strict=False))
    assert [raw[a:b] for a, b in bounds] == documents
    assert block.continues is continues
    assert slots.read(0).text.tobytes() == b"other"


def test_text_that_does_not_fit_is_refused() -> None:
    shape = TextLayout(slots=1, text_bytes=10, documents=2)
    slots = text.TextSlots(bytearray(text.size_bytes(shape)), shape)
    slots.write(0, [b"1234567890"], [5, 5], continues=False)
    with pytest.raises(ValueError, match="do not fit"):
        slots.write(0, [b"12345678901"], [5, 6], continues=False)
    with pytest.raises(ValueError, match="do not fit"):
        slots.write(0, [b""], [0, 0, 0], continues=False)
