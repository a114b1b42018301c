"""Processes for commands that are no run: pure functions over many shards.

Runs in: the command line's own process. They end with it, also when it is killed, and Ctrl-C is
for it alone to answer.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from pipeline.errors import WorkerCrashError


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes; an error in the block, or Ctrl-C, ends them at once.

    Raises:
        WorkerCrashError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkerCrashError(
            "a process was killed while it read or wrote a shard",
            "the machine may have run out of memory: try again with fewer --processes",
        ) from None
    finally:
        end(pool)


def end(pool: ProcessPoolExecutor) -> None:
    """End all processes at once, whatever they are at; who waits for them gets an error."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
