"""The Ray task of `tokenize --ray`: one range of shards, as an ordinary run on this host.

Runs in: a Ray worker, which becomes that run's supervisor and does nothing before or after it.

It keeps nothing that matters: the run writes into the folder that all hosts see, and goes on from
there wherever it is begun again. Shards that are fetched lie on this host's own disk, in as many
slots as it can have tasks at a time; together they hold the host's --max-disk.
"""

from __future__ import annotations

import importlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from pipeline import cache, shard_ranges, supervisor
from pipeline.errors import (
    BudgetError,
    CacheInUseError,
    ConfigError,
    ExitCode,
    FinewebError,
    disk_error,
)
from pipeline.shard_ranges import Done
from pipeline.supervisor import Job
from pipeline.view import make_view

PACKAGE = "fineweb-pipeline"
_IN_USE_S = 60.0  # patience with a folder whose last run is ending somewhere
_POLL_S = 0.2


class Trouble(msgspec.Struct, frozen=True):
    """What a task found that trying again does not help."""

    what: str
    remedy: str
    exit_code: int
    host: str


def make_range(job: Job, cpus: int, max_disk_gb: float, version: str) -> Done | Trouble:
    """Tokenize one range. Runs in: a Ray worker that does nothing before or after it.

    Args:
        job: The range's; its cache_dir holds the slots of this host.
        cpus: Of this task.
        max_disk_gb: Of this host: its tasks share it.
        version: The driver's.
    """
    host = socket.gethostname()
    try:
        mine = metadata.version(PACKAGE)
        if mine != version:
            raise ConfigError(
                f"this host has {PACKAGE} {mine}, and the driver {version}", "install the same"
            )
        return _patiently(lambda: _tokenize(job, cpus, max_disk_gb, host))
    except FinewebError as error:
        return Trouble(error.what, error.remedy, int(error.exit_code), host)
    except OSError as error:
        known = disk_error(error, "the task")
        if known is None:
            raise
        return Trouble(known.what, known.remedy, int(known.exit_code), host)


def _patiently(action: Callable[[], Done | Trouble]) -> Done | Trouble:
    """Do it when whoever had the folders has ended: a task that was killed leaves processes that
    end within a second, a cancelled one saves first."""
    deadline = time.monotonic() + _IN_USE_S
    while True:
        try:
            return action()
        except CacheInUseError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def _tokenize(job: Job, cpus: int, max_disk_gb: float, host: str) -> Done | Trouble:
    slots = _slots_here(cpus)
    with _slot(Path(job.cache_dir), slots) as folder:
        stream = msgspec.structs.replace(job.config.data.stream, max_disk_gb=max_disk_gb / slots)
        data = msgspec.structs.replace(job.config.data, stream=stream)
        config = msgspec.structs.replace(job.config, data=data)
        job = msgspec.structs.replace(job, config=config, cache_dir=str(folder))
        try:
            outcome = supervisor.run(job, make_view("none"))
        except BudgetError as error:
            shared = f"{max_disk_gb:g} GB for {slots} tasks: {error.remedy}"
            raise BudgetError(error.what, shared) from None
    if not outcome.complete:
        return Trouble("stopped", "the same command goes on", int(ExitCode.RESUME), host)
    done = msgspec.convert({**outcome.summary, "host": host}, Done)
    shard_ranges.finish(Path(job.run_dir), done)
    return done


def _slots_here(cpus: int) -> int:
    """How many tasks this host can have at a time."""
    ray: Any = importlib.import_module("ray")  # half of it has no types
    here = ray.get_runtime_context().get_node_id()
    mine = next(node for node in ray.nodes() if node["NodeID"] == here)
    return max(1, int(mine["Resources"].get("CPU", cpus)) // cpus)


@contextmanager
def _slot(root: Path, slots: int) -> Iterator[Path]:
    """A cache folder of this host that no other task has. What a task that was killed has left
    there is the next one's, counted in its budget, so that all slots together hold the host's.

    Raises:
        CacheInUseError: all are taken.
    """
    with ExitStack() as stack:
        for number in range(slots):
            folder = root / f"slot-{number}"
            try:
                stack.enter_context(cache.own(folder))
                break
            except CacheInUseError:
                if number == slots - 1:
                    raise
        yield folder / "cache"


def default_cache(out: Path) -> str:
    """Where a host keeps shards: a folder of its own disk, of this stream alone."""
    name = xxhash.xxh3_64_hexdigest(str(out.absolute()).encode())
    return str(Path(tempfile.gettempdir()) / f"fineweb-pipeline-{name}")
