"""Other places that metrics go to: TensorBoard and Weights & Biases, if the run asks for them.

Runs in: supervisor. Each library is imported only when its tracker is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

from pipeline.config import Config
from pipeline.errors import ConfigError

_FILE_BYTES = 256  # the first event of a file
_FRAME_BYTES = 16  # length and two checksums of each event
_TEXTS = ("sample",)


class Tracker(Protocol):
    """A place that metrics go to."""

    bytes: int  # in the run's folder

    def step(self, record: dict[str, Any]) -> None:
        """One record of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


def make(config: Config, run_dir: Path, plain: dict[str, Any]) -> Sequence[Tracker]:
    """The trackers that the configuration asks for.

    Args:
        config: The run's.
        run_dir: Its folder.
        plain: The configuration as it may be shown.

    Raises:
        ConfigError: a library is missing; says how to install it.
    """
    log = config.logging
    made: list[Tracker] = []
    if log.tensorboard:
        made.append(TensorBoard(run_dir / "tensorboard", int(log.max_log_mb * 1e6)))
    if log.wandb is not None:
        made.append(WandB(log.wandb, run_dir, plain))
    return made


def disk_bytes(config: Config) -> int:
    """What trackers may write: part of the run's budget."""
    return int(config.logging.max_log_mb * 1e6) if config.logging.tensorboard else 0


class TensorBoard:
    """Scalars and samples as TensorBoard's event files, written by TensorBoard's own code.

    Args:
        folder: Of the event files; a resumed run adds one.
        max_bytes: What they may hold together; what would go beyond is left out.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.text.metadata import create_summary_metadata
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise _missing("logging.tensorboard", "tensorboard") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._text = create_summary_metadata(display_name="", description="")
        self._max_bytes = max_bytes
        self.bytes = sum(path.stat().st_size for path in folder.iterdir()) + _FILE_BYTES
        self._writer = EventFileWriter(str(folder))

    def step(self, record: dict[str, Any]) -> None:
        """See Tracker."""
        numbers = {
            key: float(value)
            for key, value in record.items()
            if isinstance(value, int | float) and key != "step"
        }
        values = [
            self._summary.Value(tag=key, simple_value=value) for key, value in numbers.items()
        ]
        for key in _TEXTS:
            if key in record:
                value = self._summary.Value(tag=f"{key}/text_summary", metadata=self._text)
                value.tensor.dtype = 7  # DT_STRING
                value.tensor.string_val.append(record[key].encode())
                value.tensor.tensor_shape.dim.add(size=1)
                values.append(value)
        event = self._event(
            wall_time=time.time(), step=record["step"], summary=self._summary(value=values)
        )
        size = event.ByteSize() + _FRAME_BYTES
        if self.bytes + size <= self._max_bytes:
            self.bytes += size
            self._writer.add_event(event)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; a resumed run goes on in it. Its own files lie in wandb's folder,
    outside the run's byte budget.

    Args:
        project: Of Weights & Biases.
        run_dir: Names the run.
        plain: The configuration.
    """

    bytes = 0  # its files lie elsewhere

    def __init__(self, project: str, run_dir: Path, plain: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("logging.wandb", "wandb") from error
        said = xxhash.xxh3_64_hexdigest(str(run_dir.absolute()).encode())
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=f"{run_dir.name}-{said}",
            config=plain,
            resume="allow",
            # the command line and what is printed may hold what a user's URLs do
            settings=wandb.Settings(x_disable_meta=True, console="off", disable_git=True),
        )

    def step(self, record: dict[str, Any]) -> None:
        """See Tracker."""
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def _missing(key: str, package: str) -> ConfigError:
    return ConfigError(
        f"{key} needs the package {package}, which is not installed",
        f"pip install '{package}', or leave the key out",
    )
