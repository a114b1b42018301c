"""The only place that starts a process.

Runs in: supervisor.

A child is a fresh interpreter (MLX does not survive a fork) with one end of a socket, the
descriptors of the segments that its role may use, and the locks of the run's folders, which are
thus owned until the last process of the run is gone. Nothing else is inherited, so that a death
is seen as EOF at once. It is its own process group: Ctrl-C reaches the supervisor alone.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.channel import SupervisorChannel

_WAIT_S = 2.0
# Workers are one process per core: libraries must not start a thread per core in each.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}
_SUPERVISORS_OWN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TEXT_ROLES = frozenset({"decompressor", "tokenizer"})
_RING_ROLES = frozenset({"tokenizer", "writer", "trainer"})


@dataclass(eq=False)
class Child:
    """A running worker: its process, its socket and what it writes to standard error."""

    name: str
    role: str
    process: subprocess.Popen[bytes]
    channel: SupervisorChannel
    heard: float  # when it last said something, or began to have something to do
    ready: bool = False  # has said Hello
    killed_for: str | None = None  # why the supervisor has killed it
    cpu_s: float = 0.0  # that it has used, once it has been waited for

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self, reason: str | None = None) -> str:
        """End the process if it still runs, wait for it, and say how it ended.

        The wait is the fence after which the process cannot write any more.
        """
        self.killed_for = self.killed_for or reason
        self.process.kill()
        return self.wait()

    def wait(self) -> str:
        """Wait for a process whose socket is closed; one that lingers is killed."""
        before = _children_cpu_s()
        try:
            code = self.process.wait(_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.cpu_s += _children_cpu_s() - before  # nobody else is waited for meanwhile
        why = f": {self.killed_for}" if self.killed_for else ""
        return (f"signal {-code}" if code < 0 else f"exit code {code}") + why

    def close(self) -> None:
        """Close the supervisor's ends."""
        self.channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()


def _children_cpu_s() -> float:
    """CPU seconds of all processes that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(
    name: str, role: str, *, text_fd: int, ring_fd: int, lock_fds: Sequence[int], now: float
) -> Child:
    """Start a worker. Its main is found by pipeline/child.py.

    Raises:
        OSError: the system has no process or descriptor left.
    """
    ours, theirs = socket.socketpair()
    text = text_fd if role in _TEXT_ROLES else -1
    ring = ring_fd if role in _RING_ROLES else -1
    environment = os.environ | ({} if role == "trainer" else _ONE_THREAD)
    command = [sys.executable, "-m", "pipeline.child", role, str(theirs.fileno())]
    # Inherited: nobody but the supervisor ends a child, also before it can say so itself.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SUPERVISORS_OWN)
    try:
        process = subprocess.Popen(
            [*command, str(text), str(ring)],
            pass_fds=[fd for fd in (theirs.fileno(), text, ring, *lock_fds) if fd >= 0],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    return Child(name, role, process, SupervisorChannel(ours), now)


def start_rank(command: Sequence[str], *, quiet: bool) -> subprocess.Popen[bytes]:
    """Start a rank (pipeline/rank_process.py), here or through ssh: its orders come through its
    standard input, how it ended through its standard output. It ends when we do.

    Args:
        command: What to run.
        quiet: Its standard error is a pipe instead of ours.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        process_group=0,  # Ctrl-C reaches us, and through us all of them once
    )


def start_status_server(folder: Path, listening: socket.socket) -> subprocess.Popen[bytes]:
    """Start the process that answers requests about the run in this folder (pipeline/web.py). It
    has the listening socket, and ends with its standard input, and so with us."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SUPERVISORS_OWN)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.web", str(folder), str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
