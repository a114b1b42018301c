"""Checkpoints: a snapshot of the loop, written aside by a thread, made durable, renamed.

Runs in: trainer. What a whole checkpoint looks like, and which are kept, stands in
pipeline/checkpoints.py.

A snapshot costs no copy and no wait: MLX's arrays never change, an update makes new ones, so
holding the old ones is enough, and training goes on while they are written (a second set of
weights and optimizer state is in memory for so long). On CUDA reading an array from the host
moves it, which must not happen under a running kernel: there the snapshot is a copy.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, cast

import mlx.core as mx
import msgspec
import numpy as np

from pipeline import checkpoints, durable
from pipeline.checkpoints import CheckpointState
from pipeline.config import Logging, to_plain
from pipeline.errors import ShardError
from pipeline.faults import faultpoint
from pipeline.messages import Cursor
from pipeline.model_size import HEADERS_BYTES
from trainer.loop import Loop
from trainer.optim import Arrays

_PARTS = ("weights", "optimizer")


def largest_bytes(loop: Loop) -> int:
    """What one checkpoint can take on disk at most."""
    arrays = [*loop.weights.values(), *_flat(loop).values()]
    return sum(array.nbytes for array in arrays) + HEADERS_BYTES


def _flat(loop: Loop) -> Arrays:
    """The optimizer's state as one dictionary: part/name."""
    return {
        f"{part}/{name}": a for part, arrays in loop.state.items() for name, a in arrays.items()
    }


# ── writing ─────────────────────────────────────────────────────────────────────────────────


class Snapshot(NamedTuple):
    """Everything of one moment that a checkpoint holds."""

    arrays: dict[str, dict[str, np.ndarray]]  # part → name → float32
    state: CheckpointState


def snapshot(loop: Loop, cursor: Cursor, validation_loss: float | None = None) -> Snapshot:
    """The loop as it stands. Waits for the newest update to be computed."""
    mx.eval(loop.weights, loop.state)
    copy = True if mx.default_device() == mx.gpu and not mx.metal.is_available() else None
    state = CheckpointState(
        step=loop.step,
        tokens=loop.tokens,
        cursor=cursor,
        random_key=np.array(cast(list[mx.array], mx.random.state)[0]).tolist(),
        first_loss=loop.first_loss,
        config=to_plain(loop.config),
        versions={name: metadata.version(name) for name in ("mlx", "numpy", "fineweb-pipeline")},
        validation_loss=validation_loss,
    )
    arrays = {
        part: {name: np.array(array, copy=copy) for name, array in of.items()}
        for part, of in zip(_PARTS, (loop.weights, _flat(loop)), strict=True)
    }
    return Snapshot(arrays, state)


def write(one: Snapshot, run_dir: Path, log: Logging) -> tuple[Path, int]:
    """Write a snapshot and delete the checkpoints that are not to be kept.

    At no instant do more than checkpoints.most(config) + 1 lie on the disk.

    Returns:
        Its folder, and the bytes of all checkpoints.

    Raises:
        OSError: the disk is full, or gone; what was written of it is deleted by clean().
    """
    folder = run_dir / checkpoints.FOLDER
    durable.make_folder(folder)
    clean(run_dir)
    checkpoints.prune(run_dir, log)
    target = folder / checkpoints.name(one.state.step)
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir()
    for part, arrays in one.arrays.items():
        _write_safetensors(partial / f"{part}.safetensors", arrays)
        faultpoint("checkpoint:mid_write")
    with (partial / checkpoints.STATE_FILE).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(one.state)))
        durable.sync(file)
    durable.sync_folder(partial)
    faultpoint("checkpoint:before_rename")
    if target.exists():  # the same step again, after a resume: the newer one counts
        shutil.rmtree(target)
    partial.rename(target)
    durable.sync_folder(folder)
    faultpoint("checkpoint:after_rename")
    checkpoints.prune(run_dir, log)
    return target, checkpoints.size_bytes(run_dir)


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """The format of Hugging Face's safetensors, straight from the arrays' memory: the length of a
    JSON header, the header, the bytes. mx.save_safetensors would compute on MLX's own threads."""
    header: dict[str, object] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        assert array.dtype == np.float32, f"{name} is {array.dtype}"
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for array in arrays.values():
            file.write(memoryview(np.ascontiguousarray(array)).cast("B"))
        durable.sync(file)


class Writer:
    """Writes one snapshot at a time in a thread.

    Args:
        run_dir: The run's folder.
        log: What is kept.
    """

    def __init__(self, run_dir: Path, log: Logging) -> None:
        self._run_dir, self._log = run_dir, log
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._future: Future[tuple[Path, int]] | None = None
        self._one: Snapshot | None = None

    @property
    def busy(self) -> bool:
        """A snapshot was given whose result was not taken."""
        return self._one is not None

    @property
    def done(self) -> bool:
        """The result can be taken without waiting."""
        return self._future is not None and self._future.done()

    def begin(self, one: Snapshot | None = None) -> None:
        """Write this snapshot, or the last one again after a failure."""
        self._one = one or self._one
        assert self._one is not None
        self._future = self._thread.submit(write, self._one, self._run_dir, self._log)

    def result(self) -> tuple[CheckpointState, Path, int]:
        """Wait until it is written: its state, its folder, the bytes of all checkpoints.

        Raises:
            OSError: from write; begin() tries again.
        """
        assert self._future is not None and self._one is not None
        path, size = self._future.result()
        state, self._one = self._one.state, None
        return state, path, size


# ── reading ─────────────────────────────────────────────────────────────────────────────────


def restore(loop: Loop, path: Path) -> None:
    """Bring the loop to a checkpoint's state, bit for bit.

    Raises:
        ShardError: a file is damaged, or holds another model's arrays.
    """
    state = checkpoints.read(path).state
    wanted = {"weights": loop.weights, "optimizer": _flat(loop)}
    for part, arrays in wanted.items():
        file = path / f"{part}.safetensors"
        try:
            found = cast(Arrays, mx.load(str(file)))
            mx.eval(found)
        except (OSError, RuntimeError, ValueError) as error:
            raise ShardError(f"{file} cannot be read: {error}", "move its folder away") from error
        shapes = {name: array.shape for name, array in arrays.items()}
        if {name: array.shape for name, array in found.items()} != shapes:
            raise ShardError(
                f"{file} is of another model than the configuration's",
                "resume with the configuration that it was made with, or start over with --fresh",
            )
        arrays.update(found)
    for key, array in wanted["optimizer"].items():
        part, name = key.split("/", 1)
        loop.state[part][name] = array
    loop.step, loop.tokens, loop.first_loss = state.step, state.tokens, state.first_loss
    high, low = state.random_key
    mx.random.seed((high << 32) | low)


def clean(run_dir: Path) -> None:
    """Delete what a death or a full disk has left of unfinished checkpoints."""
    for path in (run_dir / checkpoints.FOLDER).glob("step-*.partial"):
        shutil.rmtree(path)
