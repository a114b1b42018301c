"""Named points at which the tests kill a process. In production each is one dictionary test.

Runs in: every worker and the supervisor. FINEWEB_FAULT="ACTION:ROLE:POINT:COUNT:LATCH" acts the
COUNT-th time a process of ROLE (or `any`) passes POINT: ACTION is kill (SIGKILL), stop (SIGSTOP)
or hang. The file LATCH is created by the process that acts, so that it happens once among all
processes and the test can assert that it did. Several are separated by ';'.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

_HANG_S = 3600.0


class _Plan(NamedTuple):
    action: str
    role: str
    point: str
    count: int
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
            if plan.point != point or plan.role not in ("any", self.role):
                continue
            self._passed[plan] += 1
            if self._passed[plan] != plan.count:
                continue
            try:
                fd = os.open(plan.latch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            except FileExistsError:
                continue
            os.write(fd, f"{self.role} {os.getpid()}\n".encode())
            os.close(fd)
            return plan
        return None

    @staticmethod
    def _act(plan: _Plan) -> None:
        if plan.action == "hang":
            time.sleep(_HANG_S)
        os.kill(os.getpid(), signal.SIGSTOP if plan.action == "stop" else signal.SIGKILL)

    def __call__(self, point: str) -> None:
        if self._plans and (plan := self._due(point)):
            self._act(plan)

    @contextlib.contextmanager
    def torn(self, point: str, sock: socket.socket, data: bytes) -> Iterator[None]:
        """Around the sending of data: when due, send half of it and die."""
        if self._plans and (plan := self._due(point)):
            sock.sendall(data[: len(data) // 2])
            self._act(plan)
        yield


faultpoint = FaultPoint(os.environ.get("FINEWEB_FAULT", ""))
