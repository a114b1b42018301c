"""Process: any worker. The first code of every child: sockets, signals, then the role's main.

    python -m pipeline.child ROLE CONTROL_FD TEXT_FD RING_FD      (-1: not given)

A child lives exactly as long as its supervisor: a thread waits for the socket to hang up and
ends the process at once, whatever the main thread is doing. On Linux the kernel does so, too,
which reaches a process that is stopped.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

from pipeline.channel import Channel, ClosedError
from pipeline.errors import ExitCode, FinewebError, disk_error
from pipeline.faults import faultpoint
from pipeline.messages import Failed, Hello

_PR_SET_PDEATHSIG = 1

ROLES = {
    "fetcher": "pipeline.workers.fetcher",
    "decompressor": "pipeline.workers.decompressor",
    "tokenizer": "pipeline.workers.tokenizer",
    "writer": "pipeline.workers.writer",
    "trainer": "trainer.process",
}


class Descriptors(NamedTuple):
    """Descriptors of the shared segments; −1 where the role does not get one."""

    text: int
    ring: int


def _die_with(sock: socket.socket) -> None:
    """Thread: end this process as soon as the supervisor's end of the socket is closed."""
    poll = select.poll()
    poll.register(sock, 0)  # only POLLHUP and POLLERR, which are always reported
    poll.poll()
    os._exit(ExitCode.OK)


def _offer_to_the_kernel() -> None:
    """Linux: a machine that runs out of memory takes this process, whose death costs nothing,
    before any other of the run."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it; nothing depends on it
            Path("/proc/self/oom_score_adj").write_text("500")


def _set_up(role: str, sock: socket.socket) -> None:
    """Leave every decision about this process's end to the supervisor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # systemd and Slurm send SIGTERM to every process
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if role not in ("writer", "trainer"):
        _offer_to_the_kernel()
    faultpoint.role = role
    threading.Thread(target=_die_with, args=(sock,), daemon=True).start()


def main() -> None:
    """Run one worker: `ROLES[role].main(channel, descriptors)` until it returns."""
    role, control_fd, text_fd, ring_fd = sys.argv[1], *map(int, sys.argv[2:5])
    sock = socket.socket(fileno=control_fd)
    _set_up(role, sock)
    channel = Channel(sock)
    try:
        channel.send(Hello(role=role, pid=os.getpid()))
        module = importlib.import_module(ROLES[role])
        module.main(channel, Descriptors(text_fd, ring_fd))
    except ClosedError:
        os._exit(ExitCode.OK)
    except MemoryError:
        print("out of memory", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)  # a death like one by the kernel, not a bug
    except Exception as error:
        known = error if isinstance(error, FinewebError) else None
        if isinstance(error, OSError):
            known = disk_error(error, f"the {role}")
        if known is not None:
            channel.send(Failed(known.what, known.remedy, int(known.exit_code)))
            sys.exit(known.exit_code)
        channel.send(
            Failed(
                f"{role} failed: {type(error).__name__}: {error}",
                "this is a bug: please report it with the traceback in log.txt",
                int(ExitCode.BUG),
                traceback.format_exc(),
            )
        )
        sys.exit(ExitCode.BUG)


if __name__ == "__main__":
    main()
