"""Process: rank. One rank of a job that `start -n` or `start --hostfile` has begun: a supervisor.

    standard input    the Order, one line of JSON; then a line for every request to stop
    standard output   the Ending, one line of JSON

The launcher holds the other end of standard input: when it is gone, however it went, the rank
reads the end of the file and stops as if it had been asked to, and so do all the others. The same
way serves a rank of this machine and one behind ssh, where no signal arrives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from io import FileIO
from pathlib import Path

import msgspec

from pipeline import supervisor
from pipeline.errors import ExitCode, FinewebError
from pipeline.supervisor import Job, Outcome
from pipeline.view import make_view

_RING_FILE = "ring.json"
_PARENT_POLL_S = 0.5


class Order(msgspec.Struct, frozen=True):
    """What a rank is to do. ring: addresses of all ranks, for MLX's ring."""

    job: Job
    progress: str
    environment: dict[str, str]
    ring: list[list[str]] | None


class Ending(msgspec.Struct, frozen=True):
    """How a rank has ended: an outcome, or an error."""

    code: int
    outcome: Outcome | None = None
    what: str = ""
    remedy: str = ""


def main() -> None:
    """Read the order, run it, say how it ended."""
    orders = FileIO(0)  # unbuffered: no lock is held when the process ends
    order = msgspec.json.decode(orders.readline(), type=Order)
    out = os.dup(1)  # whatever else writes to standard output must not stand in the ending
    os.dup2(2, 1)
    threading.Thread(target=_obey, args=(orders,), daemon=True).start()
    _prepare(order)
    ending = _run(order)
    os.write(out, msgspec.json.encode(ending) + b"\n")
    sys.exit(ending.code)


def _prepare(order: Order) -> None:
    """The environment in which MLX finds the other ranks."""
    if order.ring is not None:
        path = Path(order.job.run_dir) / _RING_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(order.ring))
        os.environ["MLX_HOSTFILE"] = str(path.resolve())
    os.environ.update(order.environment)


def _run(order: Order) -> Ending:
    view = make_view(order.progress)
    try:
        outcome = supervisor.run(order.job, view)
        return Ending(outcome.exit_code, outcome)
    except FinewebError as error:
        return Ending(int(error.exit_code), None, error.what, error.remedy)
    except Exception as error:
        import traceback

        traceback.print_exc()
        what = f"{type(error).__name__}: {error}"
        return Ending(int(ExitCode.BUG), None, what, "this is a bug: please report it")
    finally:
        view.close()


def _obey(orders: FileIO) -> None:
    """Thread: every line is a request to stop, and so is the end."""
    while orders.readline():
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def stop_with_parent() -> None:
    """For ranks that another launcher has started: stop when it is gone. mlx.launch leaves its
    ranks behind when it is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
