"""Named points at which tests and `chaos` make things go wrong. Otherwise one dictionary test.

Runs in: every worker and the supervisor. FINEWEB_FAULT="ACTION:ROLE:POINT:COUNT:LATCH" acts the
COUNT-th time a process of ROLE (or `any`) passes POINT. The file LATCH is created by the process
that acts, so that it happens once among all processes and whoever asked for it can see that it
did. Several are separated by ';'.

    kill     SIGKILL                      stop     SIGSTOP
    hang     sleep for an hour            raise    RuntimeError: a bug
    full     OSError: the disk is full    memory   take memory until somebody ends it
    record   create LATCH.<role>.<point> at every point passed, once each (POINT is *)
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

_HANG_S = 3600.0
_MEMORY_STEP_BYTES = 64 << 20
_MEMORY_STEP_S = 0.05  # not faster than the supervisor looks


class _Plan(NamedTuple):
    action: str
    role: str
    point: str
    passing: int  # which one acts, from 1 on
    latch: str


class FaultPoint:
    """Callable that acts when the environment says so."""

    def __init__(self, spec: str) -> None:
        self._plans = [self._parse(one) for one in spec.split(";") if one]
        self._passed: dict[_Plan, int] = dict.fromkeys(self._plans, 0)
        self.role = "supervisor"

    @staticmethod
    def _parse(one: str) -> _Plan:
        action, role, rest = one.split(":", 2)
        point, count, latch = rest.rsplit(":", 2)
        return _Plan(action, role, point, int(count), latch)

    def _due(self, point: str) -> _Plan | None:
        """The plan that acts now at this point; takes its latch."""
        for plan in self._plans:
            if plan.role not in ("any", self.role):
                continue
            if plan.action == "record":
                self._mark(f"{plan.latch}.{self.role}.{point}")
            if plan.point != point:
                continue
            self._passed[plan] += 1
            if self._passed[plan] == plan.passing and self._mark(plan.latch):
                return plan
        return None

    def _mark(self, path: str) -> bool:
        """Create a file that says who was here; False if it is there already."""
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            return False
        os.write(fd, f"{self.role} {os.getpid()}\n".encode())
        os.close(fd)
        return True

    @staticmethod
    def _act(plan: _Plan) -> None:
        match plan.action:
            case "hang":
                time.sleep(_HANG_S)
            case "raise":
                raise RuntimeError(f"injected at {plan.point}")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "memory":
                held = []
                while True:
                    held.append(b"\1" * _MEMORY_STEP_BYTES)
                    time.sleep(_MEMORY_STEP_S)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case _:
                os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, point: str) -> None:
        if self._plans and (plan := self._due(point)):
            self._act(plan)

    @contextlib.contextmanager
    def torn(self, point: str, sock: socket.socket, data: bytes) -> Iterator[None]:
        """Around the sending of data: when due, send half of it first."""
        if self._plans and (plan := self._due(point)):
            sock.sendall(data[: len(data) // 2])
            self._act(plan)
        yield


faultpoint = FaultPoint(os.environ.get("FINEWEB_FAULT", ""))
