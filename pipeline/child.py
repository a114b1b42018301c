"""Process: any worker. The first code of every child: sockets, signals, then the role's main.

    python -m pipeline.child ROLE CONTROL_FD TEXT_FD RING_FD      (-1: not given)

A child lives exactly as long as its supervisor: a thread waits for the socket to hang up and
ends the process at once, whatever the main thread is doing.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import sys
import threading
import traceback
from typing import NamedTuple

from pipeline.channel import Channel, ClosedError
from pipeline.errors import ExitCode, FinewebError
from pipeline.faults import faultpoint
from pipeline.messages import Failed, Hello

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


def main() -> None:
    """Run one worker: `ROLES[role].main(channel, descriptors)` until it returns."""
    role, control_fd, text_fd, ring_fd = sys.argv[1], *map(int, sys.argv[2:5])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what Ctrl-C means
    faultpoint.role = role
    sock = socket.socket(fileno=control_fd)
    threading.Thread(target=_die_with, args=(sock,), daemon=True).start()
    channel = Channel(sock)
    try:
        channel.send(Hello(role=role, pid=os.getpid()))
        module = importlib.import_module(ROLES[role])
        module.main(channel, Descriptors(text_fd, ring_fd))
    except ClosedError:
        os._exit(ExitCode.OK)
    except FinewebError as error:
        channel.send(Failed(error.what, error.remedy, int(error.exit_code)))
        sys.exit(error.exit_code)
    except Exception as error:
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
