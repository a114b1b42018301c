"""Runs of different lengths in flat arrays, and arrow arrays of them.

Runs in: tokenizers. Pure: no I/O, no clock, no process.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def positions(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The positions of runs, joined: first, first + 1 … of each, counts of them; int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first - (ends - counts), counts) + np.arange(total)


def binary_array(text: np.ndarray, bounds: np.ndarray) -> pa.Array:
    """Strings of bytes that lie one after another, bounds[k] to bounds[k + 1], without a copy."""
    offsets = pa.py_buffer(np.ascontiguousarray(bounds, np.int64))
    buffers = [None, offsets, pa.py_buffer(text)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(bounds) - 1, buffers)


def padded(pieces: list[bytes], width: int) -> np.ndarray:
    """Pieces as rows of width bytes, filled up with zeros; uint8."""
    joined = b"".join(piece.ljust(width, b"\0") for piece in pieces)
    return np.frombuffer(joined, np.uint8).reshape(-1, width)
