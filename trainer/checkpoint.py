"""Checkpoints: written aside, made durable, renamed; restored bit for bit.

Runs in: trainer. What a whole checkpoint looks like stands in pipeline/checkpoints.py.
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import msgspec

from pipeline import checkpoints
from pipeline.checkpoints import CheckpointState
from pipeline.config import to_plain
from pipeline.errors import ShardError
from pipeline.faults import faultpoint
from pipeline.messages import Cursor
from trainer.loop import Loop
from trainer.optim import Arrays

_HEADERS_BYTES = 1 << 18  # safetensors headers, state.json with the cursor and its skips
_PARTS = ("weights", "optimizer")


def largest_bytes(loop: Loop) -> int:
    """What one checkpoint can take on disk at most."""
    arrays = [*loop.weights.values(), *_flat(loop).values()]
    return sum(array.nbytes for array in arrays) + _HEADERS_BYTES


def _flat(loop: Loop) -> Arrays:
    """The optimizer's state as one dictionary: part/name."""
    return {
        f"{part}/{name}": a for part, arrays in loop.state.items() for name, a in arrays.items()
    }


def save(loop: Loop, run_dir: Path, cursor: Cursor, keep: int) -> tuple[Path, int]:
    """Write a checkpoint of the loop as it stands and delete those beyond keep.

    At no instant do more than keep + 1 lie on the disk.

    Returns:
        Its folder, and the bytes of all checkpoints.
    """
    folder = run_dir / checkpoints.FOLDER
    folder.mkdir(exist_ok=True)
    clean(run_dir)
    _prune(run_dir, keep)
    target = folder / checkpoints.name(loop.step)
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir()
    for part, arrays in zip(_PARTS, (loop.weights, _flat(loop)), strict=True):
        with (partial / f"{part}.safetensors").open("wb") as file:
            mx.save_safetensors(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        faultpoint("checkpoint:mid_write")
    state = CheckpointState(
        step=loop.step,
        tokens=loop.tokens,
        cursor=cursor,
        random_key=[int(word) for word in mx.random.state[0].tolist()],
        first_loss=loop.first_loss,
        config=to_plain(loop.config),
        versions={name: metadata.version(name) for name in ("mlx", "numpy", "fineweb-pipeline")},
    )
    with (partial / checkpoints.STATE_FILE).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state)))
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    faultpoint("checkpoint:before_rename")
    if target.exists():  # the same step again, after a resume: the newer one counts
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    faultpoint("checkpoint:after_rename")
    _prune(run_dir, keep)
    return target, checkpoints.size_bytes(run_dir)


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
            found = mx.load(str(file))
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
    """Delete what a death has left of unfinished checkpoints."""
    for path in (run_dir / checkpoints.FOLDER).glob("step-*.partial"):
        shutil.rmtree(path)


def _prune(run_dir: Path, keep: int) -> None:
    for path in checkpoints.whole(run_dir)[:-keep]:
        gone = path.with_name(f"{path.name}.partial")  # a half-deleted one must not look whole
        path.rename(gone)
        shutil.rmtree(gone)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
