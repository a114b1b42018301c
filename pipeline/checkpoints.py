"""Where checkpoints lie, what a whole one is, and which are kept.

Runs in: supervisor (finds the newest), trainer (writes them). Imports no mlx.

    runs/<name>/checkpoints/step-00000042/            whole: it was renamed when it was durable
        weights.safetensors  optimizer.safetensors  state.json
    runs/<name>/checkpoints/step-00000043.partial/    being written, or left by a death: ignored
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import Config, Logging
from pipeline.errors import ConfigError, ShardError
from pipeline.messages import Cursor

FOLDER = "checkpoints"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointState(msgspec.Struct, frozen=True):
    """What state.json holds beside the arrays."""

    step: int  # updates done
    tokens: int  # trained on so far
    cursor: Cursor
    random_key: list[int]
    first_loss: float | None
    config: dict[str, Any]
    versions: dict[str, str]
    validation_loss: float | None = None  # measured on these very weights


class Checkpoint(msgspec.Struct, frozen=True):
    """A whole checkpoint."""

    path: Path
    size_bytes: int
    state: CheckpointState

    @property
    def cursor(self) -> Cursor:
        return self.state.cursor


def name(step: int) -> str:
    """Folder name of a checkpoint; they sort by step."""
    return f"step-{step:08d}"


def whole(run_dir: Path) -> list[Path]:
    """Folders of all whole checkpoints, oldest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def latest(run_dir: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None.

    Raises:
        ShardError: its state.json cannot be read.
    """
    paths = whole(run_dir)
    return read(paths[-1]) if paths else None


# ── retention ───────────────────────────────────────────────────────────────────────────────


def retained(losses: Mapping[int, float | None], log: Logging) -> set[int]:
    """Which checkpoints stay: the newest, the one of the lowest validation loss, and every n-th
    step. Pure.

    Args:
        losses: step → validation loss (None: not measured) of all whole checkpoints.
        log: How many.

    Returns:
        Their steps. Deleting the others and asking again later never misses an earlier best.
    """
    kept = set(sorted(losses)[-log.keep_checkpoints :])
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    if log.keep_best and measured:
        kept.add(min(measured, key=lambda step: (measured[step], step)))
    if log.keep_every is not None:
        kept |= {step for step in losses if step and step % log.keep_every == 0}
    return kept


def most(config: Config) -> int:
    """Checkpoints that are on the disk at most, beside the one being written."""
    log = config.logging
    every = config.training.hyperparameters.iters // log.keep_every if log.keep_every else 0
    return log.keep_checkpoints + int(log.keep_best) + every


def prune(run_dir: Path, log: Logging) -> None:
    """Delete the checkpoints that are not retained. Runs in: trainer."""
    paths = {int(path.name[5:]): path for path in whole(run_dir)}
    losses = {step: _validation_loss(path) for step, path in paths.items()}
    for step in paths.keys() - retained(losses, log):
        gone = paths[step].with_name(f"{paths[step].name}.partial")
        paths[step].rename(gone)  # a half-deleted one must not look whole
        shutil.rmtree(gone)


def _validation_loss(path: Path) -> float | None:
    try:
        return read(path).state.validation_loss
    except ShardError:  # damaged: it goes when it is old
        return None


# ── finding ─────────────────────────────────────────────────────────────────────────────────


def find(run: str, step: int | None) -> Path:
    """The folder of a whole checkpoint that a user means.

    Args:
        run: A run's folder, its name, or a checkpoint's folder.
        step: Which one; None takes the newest.

    Raises:
        ConfigError: there is none.
    """
    for folder in (Path(run), Path("runs") / run):
        if _NAME.fullmatch(folder.name) and (folder / STATE_FILE).is_file():
            return folder
        paths = whole(folder)
        found = [path for path in paths if step is None or path.name == name(step)]
        if found:
            return found[-1]
        if paths:
            raise ConfigError(
                f"{folder} has no checkpoint of step {step}",
                f"it has those of steps {', '.join(str(int(path.name[5:])) for path in paths)}",
            )
    raise ConfigError(
        f"{run} is no run with a checkpoint",
        "give the folder of a run, as in runs/demo, or train first: fineweb-pipeline start",
    )


def read(path: Path) -> Checkpoint:
    """A whole checkpoint's state. Raises: ShardError."""
    try:
        data = (path / STATE_FILE).read_bytes()
        state = msgspec.json.decode(data, type=CheckpointState)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(
            f"{path} cannot be read: {error}",
            "move that folder away: the run then resumes from the checkpoint before it",
        ) from error
    return Checkpoint(path, _bytes(path), state)


def size_bytes(run_dir: Path) -> int:
    """Bytes of everything in the checkpoints folder."""
    return _bytes(run_dir / FOLDER)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
