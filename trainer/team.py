"""The ranks of a run as the trainer sees them: one group of mx.distributed.

Runs in: trainer. Ring, NCCL, JACCL or MPI: whichever the environment names and MLX has. A group
of one does all of this by the same code: MLX's collectives are then the identity.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from functools import reduce

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from xxhash import xxh3_64_intdigest

from pipeline.errors import ConfigError, PeerLostError
from trainer.optim import Arrays

_BUCKET_BYTES = 32 << 20  # what one collective carries: small ones cost their latency
_FRAME_BYTES = 4096  # of a message; a longer one takes a second round
_HEADER = struct.Struct("<IQQ")  # length, number of the exchange, xxh3_64 of what the frame holds
_MEASURE_EVERY = 50  # updates between two whose all-reduce is waited for, on a GPU
_LIBRARIES = ("[ring]", "[nccl]", "[jaccl]", "[mpi]", "NCCL", "distributed")


class Team:
    """All ranks.

    Args:
        number: Ours, as the supervisor knows it.
        size: How many there are.
        gradients: What gradients are summed in: float32 or bfloat16.

    Raises:
        ConfigError: MLX sees another group.
        PeerLostError: the group does not come together.
    """

    def __init__(self, number: int = 0, size: int = 1, gradients: str = "float32") -> None:
        try:
            self._group = mx.distributed.init(strict=size > 1)
        except RuntimeError as error:
            raise lost(error) from error
        found = self._group.rank(), self._group.size()
        if found != (number, size):
            raise ConfigError(
                f"this is rank {number} of {size}, and MLX says rank {found[0]} of {found[1]}",
                "start all ranks with start -n, start --hostfile or mlx.launch",
            )
        self.number, self.size = found
        self._dtype = mx.bfloat16 if gradients == "bfloat16" else mx.float32
        self._frame_bytes = _FRAME_BYTES
        self._exchanges = self._reductions = 0
        self.all_reduce_s: float | None = None  # of the last update that was measured
        self.all_reduce_bytes = 0  # of gradients, per update and rank

    # ── messages ────────────────────────────────────────────────────────────────────────────

    def exchange(self, mine: bytes) -> list[bytes]:
        """Every rank's message, in their order. All ranks call it, or nobody comes back.

        When a rank is lost MLX's ring may return whatever its memory held before, instead of an
        error: each message says which exchange it belongs to, and what its bytes must hash to.

        Raises:
            PeerLostError: one of them is gone.
        """
        self._exchanges += 1
        try:
            while True:
                frame = np.zeros(_HEADER.size + self._frame_bytes, np.uint8)
                part = mine[: self._frame_bytes]
                header = _HEADER.pack(len(mine), self._exchanges, xxh3_64_intdigest(part))
                whole = np.frombuffer(header + part, np.uint8)
                frame[: len(whole)] = whole
                rows = np.array(mx.distributed.all_gather(mx.array(frame), group=self._group))
                found = [self._opened(row) for row in rows.reshape(self.size, -1)]
                longest = max(length for length, _ in found)
                if longest <= self._frame_bytes:
                    return [data for _, data in found]
                self._frame_bytes = longest  # on all ranks alike
        except RuntimeError as error:
            raise lost(error) from error

    def _opened(self, row: np.ndarray) -> tuple[int, bytes]:
        """A message's length, and as much of it as the frame holds. Raises: PeerLostError."""
        raw = row.tobytes()
        length, exchange, digest = _HEADER.unpack_from(raw)
        data = raw[_HEADER.size :][: min(length, self._frame_bytes)]
        if exchange != self._exchanges or digest != xxh3_64_intdigest(data):
            raise lost(RuntimeError("a message is not what its sender has sent"))
        return length, data

    # ── arrays ──────────────────────────────────────────────────────────────────────────────

    def mean(self, gradients: Arrays, loss: mx.array) -> tuple[Arrays, mx.array]:
        """Their means over all ranks, in buckets; a graph, which MLX may compute while the last
        backward pass is still under way. Now and then (on the CPU always, where nothing is
        gained by not waiting) it is waited for and timed."""
        if self.size == 1:
            return gradients, loss  # as nn.average_gradients does, and as free
        # in the same order on all ranks, whatever made the dictionary
        cast = {name: gradients[name].astype(self._dtype) for name in sorted(gradients)}
        cast["loss"] = loss.astype(self._dtype)
        self.all_reduce_bytes = sum(array.nbytes for array in cast.values())
        measured = mx.default_device() == mx.cpu or self._reductions % _MEASURE_EVERY == 0
        self._reductions += 1
        if measured:
            mx.eval(cast)
        begin = time.perf_counter()
        tree = nn.average_gradients(
            tree_unflatten(list(cast.items())),
            group=self._group,
            all_reduce_size=_BUCKET_BYTES,
        )
        reduced: Arrays = dict(tree_flatten(tree))
        means = {name: array.astype(mx.float32) for name, array in reduced.items()}
        if measured:
            mx.eval(means)
            self.all_reduce_s = time.perf_counter() - begin
        return means, means.pop("loss")

    def from_first(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays on all ranks, bit for bit (a sum of their bits and of zeros)."""
        found: Arrays = {}
        for name in sorted(arrays):  # the same order on all ranks
            array = arrays[name]
            bits = mx.view(array.reshape(-1), mx.uint32)
            mine = bits if self.number == 0 else mx.zeros_like(bits)
            whole = mx.distributed.all_sum(mine, group=self._group)
            found[name] = mx.view(whole, array.dtype).reshape(array.shape)
            mx.eval(found[name])  # one at a time: there is no second model in memory
        return found


def checksum(parts: Sequence[Arrays]) -> int:
    """The sum of all bits, as uint32 words: ranks whose arrays differ show it."""
    sums = [
        mx.view(array.reshape(-1), mx.uint32).astype(mx.uint32).sum()
        for arrays in parts
        for array in arrays.values()
    ]
    return int(np.array(reduce(mx.add, sums)))


def is_lost(error: RuntimeError) -> bool:
    """Whether MLX's library for several ranks says that it has lost one."""
    return any(name in str(error) for name in _LIBRARIES)


def lost(error: RuntimeError) -> PeerLostError:
    """The error that the user is told."""
    return PeerLostError(
        f"the ranks do not reach one another any more: {error}",
        "the same command goes on from the last checkpoint",
    )
